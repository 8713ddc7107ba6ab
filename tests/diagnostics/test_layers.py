"""What a step does to each parameter, against what it was made to do."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from helpers import make, network
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.callbacks import Diagnosis, JSONLines
from eggroll_trainer.diagnostics import LayerFigures, layer_figures
from eggroll_trainer.diagnostics.layers import effective_rank, table


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 9), (40, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_the_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int], scale: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(matrix.double()).square()
    expected = float(squares.sum() ** 2 / squares.square().sum())
    assert effective_rank(scale * matrix) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_equal_directions_are_counted(rank: int) -> None:
    left, _ = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(6, rank, dtype=torch.float64))
    assert effective_rank(left @ right.T) == pytest.approx(rank)


def test_independent_numbers_have_the_rank_that_is_said() -> None:
    # (Σs²)² is about (O·I)² and Σs⁴ on average O·I·(O + I + 1); relative deviations fall like 1/√(O·I).
    ranks = [effective_rank(torch.randn(60, 40, generator=torch.Generator().manual_seed(i))) for i in range(20)]
    assert sum(map(float, filter(None, ranks))) / 20 == pytest.approx(60 * 40 / 101, rel=0.02)


def test_there_is_none_of_what_has_not_moved() -> None:
    assert effective_rank(torch.zeros(3, 4)) is None and effective_rank(torch.zeros(0, 4)) is None


def test_figures_of_a_known_step() -> None:
    before = {"w": torch.eye(4), "b": torch.zeros(4), "frozen": torch.ones(2)}
    after = {"w": torch.eye(4) + 0.1 * torch.ones(4, 4), "b": torch.full((4,), 0.5)}
    found = layer_figures(before, after, {"w": torch.float32, "b": torch.float32}, None)
    assert list(found) == ["w", "b"]
    assert found["w"].relative_update == pytest.approx(0.4 / 2) and found["w"].effective_rank == pytest.approx(1.0)
    # Relative to nothing it is nothing.
    assert found["b"].relative_update == 0.0 and found["b"].effective_rank is None
    assert found["b"].changed_share == 1.0 and found["b"].split_half_cosine is found["b"].signal_share is None


def test_what_of_a_step_shows_in_bf16() -> None:
    # Between 1 and 2 bf16 numbers are 2⁻⁷ apart: a step of a hundredth of that moves one weight in a hundred.
    before = {"w": 1 + torch.arange(10_000) / 10_000}
    after = {"w": before["w"] + 2**-7 / 100}
    found = layer_figures(before, after, {"w": torch.bfloat16}, None)["w"]
    assert found.changed_share == pytest.approx(0.01, abs=0.005)
    assert layer_figures(before, after, {"w": torch.float32}, None)["w"].changed_share == 1.0


class Steps:
    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def on_generation(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.metrics.append(dict(metrics))


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def first_layer_only(model: nn.Module) -> Tensor:
    assert isinstance(model, nn.Sequential)
    return -(model[0](X) - 1).square().mean()


def test_the_signal_is_where_the_fitness_is() -> None:
    trainer = EGGROLLTrainer(
        model=network(), fitness_fn=first_layer_only, population_size=512, noise_reuse=2, seed=0, learning_rate=0.1
    )
    diagnosis = Diagnosis(every=1)
    trainer.train(1, verbose=False, callback=diagnosis)
    shares = {name: one.signal_share or 0.0 for name, one in diagnosis.layers.items()}
    assert shares["0.weight"] + shares["0.bias"] > 0.9 > shares["0.weight"] > shares["3.weight"]
    first, last = diagnosis.layers["0.weight"].split_half_cosine, diagnosis.layers["3.weight"].split_half_cosine
    # By chance it is off by about 1/√(2·D), of 32 and of 16 weights.
    assert first is not None and first > 2 / math.sqrt(2 * 32)
    assert last is not None and abs(last) < 4 / math.sqrt(2 * 16)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_it_looks_when_it_is_time_and_loggers_write_it(tmp_path: Any) -> None:
    trainer, steps, log = make(), Steps(), JSONLines(tmp_path / "run.jsonl")
    diagnosis = Diagnosis(every=3)
    assert "no generation has been measured" in str(diagnosis)
    trainer.train(7, verbose=False, callback=[diagnosis, steps, log])
    assert [m["generation"] for m in steps.metrics if "layers" in m] == [3, 6] and diagnosis.generation == 6
    last = steps.metrics[5]
    squares = sum((one["relative_update"] * length) ** 2 for one, length in _with_lengths(trainer, last))
    # The model has moved on by a generation since.
    assert math.sqrt(squares) == pytest.approx(last["update_norm"], rel=0.2)
    assert set(last["seconds_by_station"]) == {"noise", "evaluation", "check", "update"}
    (row,) = [line for line in log.read() if line["generation"] == 6]
    assert row["layers/0.weight/relative_update"] == diagnosis.layers["0.weight"].relative_update
    assert row["seconds_by_station/update"] > 0
    assert "layers/0.weight/relative_update" not in log.read()[6]
    text = str(diagnosis)
    assert "0.weight" in text and re.search(r"generation 6: .* evaluations/s", text)


def _with_lengths(trainer: Any, metrics: dict[str, Any]) -> list[tuple[dict[str, float], float]]:
    sizes = {name: p.detach().norm().item() for name, p in trainer.model.named_parameters()}
    return [(metrics["layers"][name], size) for name, size in sizes.items()]


def test_it_changes_nothing() -> None:
    trainer, twin = make(), make()
    trainer.train(4, verbose=False, callback=Diagnosis(every=1))
    twin.train(4, verbose=False)
    assert torch.equal(trainer.current_params, twin.current_params) and trainer.history == twin.history


def test_frozen_parameters_and_custom_trainers_have_what_is_known() -> None:
    from helpers import Custom

    model = network()
    model[0].requires_grad_(False)
    diagnosis = Diagnosis(every=1)
    make(Custom, model=model).train(2, verbose=False, callback=diagnosis)
    assert set(diagnosis.layers) == {"3.weight", "3.bias"}
    assert diagnosis.layers["3.weight"].split_half_cosine is None and diagnosis.layers["3.weight"].relative_update > 0
    assert "split_half_cosine" not in diagnosis.layers["3.weight"].plain()


def test_bf16_weights_are_told_by_what_is_stored() -> None:
    model = network(torch.bfloat16)
    trainer = make(
        model=model, fitness_fn=lambda m: -m(torch.ones(1, 4).bfloat16()).square().sum().item(), optimizer=None,
        learning_rate=1e-4,
    )  # fmt: skip
    diagnosis = Diagnosis(every=1)
    before = model.get_parameter("0.weight").clone()
    trainer.train(1, verbose=False, callback=diagnosis)
    changed = torch.ne(model.get_parameter("0.weight"), before).double().mean().item()
    assert diagnosis.layers["0.weight"].changed_share == changed < 0.5


def test_an_empty_table_has_a_head() -> None:
    assert table({}).startswith("parameter  weights")
    wide = table({"a.very.long.name": LayerFigures(1, 0.1, None, None, None, 0.5)}).splitlines()
    assert len(set(map(len, wide))) == 1


@pytest.mark.parametrize("every, error", [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("10", TypeError)])
def test_bad_input(every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every must be"):
        Diagnosis(every)
