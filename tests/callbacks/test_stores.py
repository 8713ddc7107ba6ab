"""What TensorBoard and MLflow show of a run besides its curves."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from watching import Spy, make_trainer

from eggroll_trainer import EGGROLLTrainer, batched
from eggroll_trainer.callbacks import MLflow, TensorBoard


def shown(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_histograms_of_the_scores(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = make_trainer()
    trainer.train(4, verbose=False, callback=TensorBoard(tmp_path, histogram_every=2))
    found = shown(tmp_path).Histograms("scores")
    assert [one.step for one in found] == [2, 4]
    assert trainer.last_generation is not None
    scores = trainer.last_generation.scores
    last = found[-1].histogram_value
    assert (last.num, last.min, last.max) == (8, float(scores.min()), float(scores.max()))
    assert last.sum == pytest.approx(float(scores.sum()))


def test_histograms_of_several_tasks_and_without_what_is_not_finite(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    @batched
    def fitness(population: Any) -> torch.Tensor:
        scores = population(torch.ones(2, 3)).squeeze(-1)
        return scores.index_fill(0, torch.tensor([0]), torch.nan)

    trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=fitness, population_size=8, seed=0)
    with pytest.warns(RuntimeWarning, match="not finite"):
        trainer.train(1, verbose=False, callback=TensorBoard(tmp_path))
    assert shown(tmp_path).Histograms("scores")[0].histogram_value.num == 7


def test_images_videos_texts_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    image = pytest.importorskip("PIL.Image")
    board = TensorBoard(tmp_path)
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255

    def draw(trainer: Any, metrics: Any) -> None:
        metrics["advice"] = "go on"
        board.image("weights", torch.linspace(0, 1, 24).view(4, 6))
        board.video("policy", [red, np.roll(red, 1, 2)], fps=10)

    trainer = make_trainer()
    trainer.train(2, verbose=False, callback=[board, Spy([], always=draw)])
    trainer.train(1, verbose=False, callback=[Spy([], always=lambda t, m: m.update(advice="stop")), board])
    found = shown(tmp_path)
    weights = found.Images("weights")
    assert [one.step for one in weights] == [1, 2] and (weights[0].height, weights[0].width) == (4, 6)
    pixels = np.asarray(image.open(io.BytesIO(weights[0].encoded_image_string)))
    assert pixels.shape == (4, 6, 3) and pixels[0, 0].tolist() == [0] * 3 and pixels[-1, -1].tolist() == [255] * 3
    video = image.open(io.BytesIO(found.Images("policy")[0].encoded_image_string))
    assert video.format == "GIF" and video.n_frames == 2 and video.info["duration"] == 100
    assert np.asarray(video.convert("RGB"))[0, 0].tolist() == [255, 0, 0]
    # Each text once, though it stood in the metrics of two generations; it came after the board's turn in the first.
    texts = found.Tensors("advice/text_summary")
    assert [(one.step, one.tensor_proto.string_val[0]) for one in texts] == [(3, b"stop")]
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert b"population_size" in found.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_figures_are_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    board, trainer = TensorBoard(tmp_path), make_trainer()

    def draw(trainer: Any, metrics: Any) -> None:
        board.image("curve", trainer.plot())

    trainer.train(1, verbose=False, callback=[board, Spy([], always=draw)])
    (curve,) = shown(tmp_path).Images("curve")
    assert curve.encoded_image_string.startswith(b"\x89PNG") and curve.width > curve.height > 100


@pytest.mark.parametrize("given", [np.zeros((2, 2, 4)), np.zeros(3)])
def test_bad_images(given: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    board.open()
    with pytest.raises(ValueError, match=r"an image must be \[height, width, 3\]"):
        board.image("bad", given)
    with pytest.raises(ValueError, match="at least one image"):
        board.video("bad", [])
    board.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_database(tmp_path: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    trainer = make_trainer()
    texts = Spy([], always=lambda trainer, metrics: metrics.update(status="green"))
    trainer.train(3, verbose=False, callback=[texts, MLflow("it's a run", tracking_uri=uri)])
    trainer.save(tmp_path / "run.pt")
    again = make_trainer()
    again.load(tmp_path / "run.pt")
    second = MLflow("it's a run", tracking_uri=uri)
    again.train(2, verbose=False, callback=second)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(second.run_id)
    history = client.get_metric_history(second.run_id, "mean_fitness")
    assert [(m.step, m.value) for m in history] == list(enumerate(again.fitness_history, 1))
    assert run.info.status == "FINISHED" and run.data.tags["status"] == "green"
    assert run.data.params["population_size"] == "8" and os.path.exists(tmp_path / "mlflow.db")
