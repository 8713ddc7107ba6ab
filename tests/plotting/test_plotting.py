"""Plots of runs: what they show, whether it can be told apart, and where runs are read from."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import environment
from watching import Spy, make_trainer

from eggroll_trainer.callbacks import CSV, Checkpoints, JSONLines
from eggroll_trainer.plotting import RunCurves, load_run, plot_runs
from eggroll_trainer.plotting.styles import LINES, LOOKS, STYLES

pytest.importorskip("matplotlib")


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_any_number_that_changes_is_plotted(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train(5, verbose=False)
    trainer.history["split_half_cosine"] = [0.1, 0.2, math.nan, 0.4, 0.5]
    trainer.history["layers"] = [{"0.weight": i} for i in range(5)]
    # Noted now and then, and no number.
    trainer.history["noise"] = [1.0, 2.0]
    trainer.history["status"] = ["green"] * 5
    figure = trainer.plot(tmp_path / "run.png")
    panels = dict(zip(titles(figure), figure.axes, strict=True))
    assert {"update norm", "split half cosine", "layers/0.weight", "noise"} < panels.keys() and "status" not in panels
    fitness, cosine, noise = panels["fitness"], panels["split half cosine"], panels["noise"]
    mean = fitness.lines[0]
    assert list(mean.get_ydata()) == trainer.history["mean_fitness"] and list(mean.get_xdata()) == [1, 2, 3, 4, 5]
    labels = [text.get_text() for text in fitness.get_legend().get_texts()]
    assert labels == [
        *("mean of the population", "± standard deviation of the members", "best of the generation", "best so far")
    ]
    assert list(cosine.lines[0].get_xdata()) == [1, 2, 4, 5] and list(noise.lines[0].get_xdata()) == [4, 5]
    assert "sigma 0.1" in figure.get_supxlabel() and "learning rate 0.01" in figure.get_supxlabel()
    # The band is the mean ± one standard deviation.
    (band,) = fitness.collections
    corners = band.get_paths()[0].vertices[:, 1]
    means, stds = np.array(trainer.history["mean_fitness"]), np.array(trainer.history["std_fitness"])
    assert corners.max() == pytest.approx((means + stds).max()) and corners.min() == pytest.approx((means - stds).min())
    assert figure._repr_png_().startswith(b"\x89PNG") and (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_many_parameters_do_not_hide_the_others() -> None:
    columns = {f"layers/{i}.weight/relative_update": [0.1, 0.2] for i in range(50)}
    run = RunCurves("run", {"generation": [1, 2], "mean_fitness": [0.0, 1.0], "update_norm": [1.0, 2.0], **columns})
    figure = plot_runs([run])
    assert titles(figure) == ["fitness", "update norm"] and "layers: 50 numbers" in figure.get_supxlabel()
    chosen = plot_runs([run], metrics=["layers/3.weight/relative_update"])
    assert titles(chosen) == ["fitness", "layers/3.weight/relative update"]


def test_files_of_every_kind_are_the_same_each_time(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train(3, verbose=False)
    for name in ("run.svg", "run.PNG", "deep/er/run.pdf"):
        trainer.plot(tmp_path / name, title="A title")
        assert (tmp_path / name).stat().st_size > 1000
    root = xml.etree.ElementTree.parse(tmp_path / "run.svg").getroot()
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A title", "fitness", "generation", "best so far"} <= set(texts)


def test_several_runs_are_compared() -> None:
    runs = [
        RunCurves(f"run {i}", {"mean_fitness": [i, i + 1], "std_fitness": [1, 1], "sigma": [i, i]}) for i in range(9)
    ]
    few, many = plot_runs(runs[:3]), plot_runs(runs)
    assert titles(few) == ["fitness", "sigma"] and len(few.axes[0].lines) == 3 and len(few.axes[0].collections) == 3
    # Many bands would hide each other, and a long legend the curves.
    assert len(many.axes[0].collections) == 0 and many.axes[0].get_legend() is None and len(many.legends) == 1
    assert [text.get_text() for text in many.legends[0].get_texts()] == [run.name for run in runs]


def test_runs_of_one_name_become_a_curve() -> None:
    seeds = [
        RunCurves("a", {"mean_fitness": [0.0, 2.0, 4.0, 9.0], "sigma": [1, 2, 3, 4]}),
        RunCurves("a", {"generation": [1, 3], "mean_fitness": [2.0, 6.0], "sigma": [1, 2]}),
        RunCurves("b", {"mean_fitness": [1.0, math.nan, 1.0]}),
    ]
    figure = plot_runs(seeds)
    mean, other = figure.axes[0].lines
    # As far as both go; the second is read off between its points.
    assert list(mean.get_xdata()) == [1, 2, 3] and list(mean.get_ydata()) == [1.0, 3.0, 5.0]
    assert mean.get_label() == "a (2 runs)" and other.get_label() == "b" and list(other.get_xdata()) == [1, 3]
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.0, 6.0)
    first, second = figure.axes[1].lines
    assert first.get_color() == second.get_color() and first._dash_pattern == second._dash_pattern


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("style", STYLES)
def test_curves_stand_out_and_can_be_told_apart(style: str) -> None:
    look = LOOKS[style]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    # What WCAG 2.1 asks of graphics, and of text.
    assert all(contrast(color, look.page) >= 3 for color in look.lines) and contrast(look.ink, look.page) >= 4.5
    # Nobody needs the colours: no two lines have the same dashes.
    assert len(look.lines) <= len(set(map(str, LINES)))
    if style != "print":
        # Smallest distance in the plane that is left to those who lack red or green receptors (Viénot 1999).
        for lacking in (PROTAN, DEUTAN):
            linear = [lacking @ np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2 for c in look.lines]
            # As bright as screens show it, which is how bright it looks.
            seen = [np.clip(one, 0, 1) ** (1 / 2.2) for one in linear]
            nearest = min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2))
            assert nearest > 0.2


# From linear RGB to linear RGB as dichromats see it; rows for red, green and blue.
PROTAN = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTAN = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


@pytest.mark.parametrize("style", STYLES)
def test_lines_of_a_figure(style: Any) -> None:
    trainer = make_trainer()
    trainer.train(2, verbose=False)
    figure = trainer.plot(style=style)
    lines = figure.axes[0].lines
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in lines}) == len(lines) == 3
    assert figure.get_facecolor() == pytest.approx(
        [*(int(LOOKS[style].page[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1]
    )


def test_runs_are_read_from_wherever_they_were_kept(tmp_path: Path) -> None:
    trainer = make_trainer()
    late = Spy([], at_2=lambda trainer, metrics: metrics.update(accuracy=0.5))
    trainer.train(
        3,
        verbose=False,
        callback=[
            *(late, JSONLines(tmp_path / "run" / "metrics.jsonl"), CSV(tmp_path / "table" / "mine.csv")),
            Checkpoints(tmp_path / "kept" / "checkpoints"),
        ],
    )
    trainer.save(tmp_path / "one.pt")
    mean = trainer.fitness_history
    for name in ("run", "run/metrics.jsonl", "table", "table/mine.csv", "kept", "kept/checkpoints", "one.pt"):
        run = load_run(tmp_path / name)
        assert run.columns["mean_fitness"].tolist() == mean and run.x().tolist() == [1, 2, 3]
        assert run.name == Path(name).name.split(".")[0]
    accuracy = load_run(tmp_path / "run").columns["accuracy"]
    assert accuracy[1] == 0.5 and np.isnan(accuracy[[0, 2]]).all()
    assert load_run(tmp_path / "run", "mine").name == "mine"


def test_records_of_commands() -> None:
    lines = [
        {"generation": i, "steps": 10 * i, "mean_return": i, "best_return": 2 * i, "std_return": 1.0} for i in (1, 2)
    ]
    lines[1] |= {"eval_return": 3, "eval_std": 0.5}
    run = RunCurves.of_records("cartpole", lines)
    figure = plot_runs([run], x="steps")
    assert titles(figure) == ["fitness"] and list(figure.axes[0].lines[0].get_xdata()) == [10, 20]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "centre" in labels and "best so far" not in labels


def test_bad_input(tmp_path: Path) -> None:
    trainer = make_trainer()
    with pytest.raises(ValueError, match="train a generation first"):
        trainer.plot()
    trainer.train(1, verbose=False)
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf, got 'run\.gifx'"):
        trainer.plot(tmp_path / "run.gifx")
    with pytest.raises(ValueError, match="style must be one of 'light', 'dark', 'print', got 'red'"):
        trainer.plot(style="red")  # type: ignore[arg-type]
    run = RunCurves("a", {"mean_fitness": [1.0]})
    wrong: list[tuple[dict[str, Any], str]] = [({"x": "steps"}, "no column"), ({"metrics": ["b"]}, "no run has 'b'")]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            plot_runs([run], **options)
    with pytest.raises(ValueError, match="no run to plot"):
        plot_runs([])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "text.jsonl").write_text("a}\n")
    (tmp_path / "list.jsonl").write_text("[{}\n")
    for name, error, message in (
        ("none", FileNotFoundError, "there is no run at"),
        ("empty", FileNotFoundError, "contains no run"),
        ("none.jsonl", ValueError, "no generation yet"),
        ("text.jsonl", ValueError, "not a file of JSON lines"),
    ):
        with pytest.raises(error, match=message):
            load_run(tmp_path / name)


def test_plots_need_no_pyplot_and_the_core_no_matplotlib(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = {sys.path}
from watching import make_trainer
import eggroll_trainer.plotting
trainer = make_trainer()
trainer.train(1, verbose=False)
assert "matplotlib" not in sys.modules
trainer.plot({str(tmp_path / "run.svg")!r})
assert "matplotlib.pyplot" not in sys.modules
for name in ("wandb", "mlflow", "tensorboard", "gymnasium", "transformers", "tyro"):
    assert name not in sys.modules, name
"""
    )
    # From the first import on.
    subprocess.run([sys.executable, script], check=True, env=environment())
