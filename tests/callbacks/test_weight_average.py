"""An average of the weights, against the sum that defines it; kept over checkpoints, the same on several processes."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, fitness, make, network
from launching import python, run_script
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer
from eggroll_trainer.callbacks import Checkpoints, WeightAverage


class Centres:
    """Notes the weights after every generation."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_generation(self, trainer: Any, metrics: Any) -> None:
        self.seen.append(trainer.current_params.double())


def average_of(trainer: ESTrainer, average: WeightAverage) -> Tensor:
    return trainer._centre.flatten(average.parameters)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_weighted_mean_of_the_centres(decay: float, dtype: torch.dtype) -> None:
    model = network(dtype)
    trainer = make(model=model, fitness_fn=lambda m: -m(torch.ones(1, 4, dtype=dtype)).square().sum().item())
    centres, average = Centres(), WeightAverage(decay)
    trainer.train(12, verbose=False, callback=[centres, average])
    seen = torch.stack(centres.seen)
    weights = decay ** torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
    expected = (weights[:, None] * seen).sum(0) / weights.sum()
    # Twelve means of two numbers, each rounded to the masters' precision.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    error = 12 * eps * seen.abs().max().item()
    torch.testing.assert_close(average_of(trainer, average).double(), expected, rtol=0, atol=error)
    assert average.model is not model and next(average.model.parameters()).dtype == dtype


def test_averages_of_bf16_weights_move_where_the_weights_do_not() -> None:
    # A hundredth of a change below the resolution of bf16, 0.4 %, is added again and again.
    model = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=lambda m: m(torch.ones(1, 2).bfloat16()).item(), seed=0, learning_rate=1e-4
    )
    average = WeightAverage(0.99)
    trainer.train(20, verbose=False, callback=average)
    assert torch.equal(average.model.get_parameter("weight"), torch.ones(1, 2, dtype=torch.bfloat16))
    assert (average.parameters["weight"] - 1).abs().min() > 1e-5


def test_the_run_is_the_one_without_it() -> None:
    trainer, twin = make(), make()
    trainer.train(4, verbose=False, callback=WeightAverage())
    twin.train(4, verbose=False)
    assert torch.equal(trainer.current_params, twin.current_params) and trainer.history == twin.history


def test_resumed_it_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole, average = make(), WeightAverage(0.8)
    whole.train(7, verbose=False, callback=average)

    trainer = make()
    trainer.train(3, verbose=False, callback=WeightAverage(0.8), checkpoints=Checkpoints(tmp_path, every=1))
    again, resumed = make(), WeightAverage(0.8)
    assert Checkpoints(tmp_path).restore(again)
    again.train(4, verbose=False, callback=resumed)
    assert_same(resumed.parameters, average.parameters)
    assert_same(again.state_dict(), whole.state_dict())


def test_it_goes_on_in_later_calls_and_in_loops_of_ones_own() -> None:
    trainer, average = make(), WeightAverage(0.8)
    trainer.train(2, verbose=False, callback=average)
    trainer.train(2, verbose=False, callback=average)
    looped, own = make(), WeightAverage(0.8)
    for _ in range(4):
        looped.step()
        own.update(looped)
        # Once a generation.
        own.update(looped)
    assert_same(own.parameters, average.parameters)


def test_another_decay_begins_anew_beside_it() -> None:
    trainer = make()
    quick, slow = WeightAverage(0.5), WeightAverage(1e-05)
    trainer.train(3, verbose=False, callback=[quick, slow])
    assert sorted(trainer.state_dict()["extra"]) == ["weight_average_0_5", "weight_average_1e_05"]
    assert not torch.equal(average_of(trainer, quick), average_of(trainer, slow))


def test_a_checkpoint_without_it_says_so_and_reset_forgets_it(tmp_path: Path) -> None:
    plain = make()
    plain.train(1, verbose=False)
    plain.save(tmp_path / "plain.pt")
    trainer, average = make(), WeightAverage()
    trainer.train(2, verbose=False, callback=average)
    with pytest.warns(RuntimeWarning, match="the checkpoint has no weight_average_0_95"):
        trainer.load(tmp_path / "plain.pt")
    trainer.reset()
    assert average.parameters == {}
    trainer.train(1, verbose=False, callback=average)
    assert torch.equal(average_of(trainer, average), trainer.current_params)


def test_a_parameter_that_is_freed_later_counts_from_then_on() -> None:
    model = network()
    model[0].requires_grad_(False)
    trainer, average = make(model=model), WeightAverage(0.5)
    trainer.train(2, verbose=False, callback=average)
    assert set(average.parameters) == {"3.weight", "3.bias"}
    model[0].requires_grad_(True)
    trainer.train(1, verbose=False, callback=average)
    assert torch.equal(average.parameters["0.weight"], model.get_parameter("0.weight"))
    assert not torch.equal(average.parameters["3.weight"], model.get_parameter("3.weight"))


def test_it_is_in_the_model_inside_the_block() -> None:
    trainer, average = make(), WeightAverage(0.5)
    trainer.train(3, verbose=False, callback=average)
    before = copy.deepcopy(trainer.model.state_dict())
    with average.weights() as model:
        assert model is trainer.model
        assert_same(dict(model.named_parameters()), {k: nn.Parameter(v) for k, v in average.parameters.items()})
        assert fitness(model) == fitness(average.model) != trainer.history["mean_fitness"][-1]
        with pytest.raises(RuntimeError, match="leave the block first"):
            trainer.step()
    assert_same(trainer.model.state_dict(), before)
    trainer.step()


class ByRegister(nn.Module):
    """Finds a part of itself in a register of the class, as no copy can know."""

    register: dict[str, nn.Module] = {}

    def __init__(self) -> None:
        super().__init__()
        self.net = self.register["net"] = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.register["net"](x)


def test_a_model_that_cannot_be_copied() -> None:
    trainer, average = make(model=ByRegister()), WeightAverage(0.5)
    trainer.train(2, verbose=False, callback=average)
    with pytest.raises(RuntimeError, match="WeightAverage.model cannot copy this model.*average.weights"):
        average.model  # noqa: B018


def test_copies_that_evaluate_members_go_without_it() -> None:
    trainer = make()
    trainer.train(1, verbose=False, callback=WeightAverage())
    assert trainer.working_state()["extra"] == {}
    assert copy.deepcopy(trainer).working_state()["extra"] == {}


def test_under_inference_mode() -> None:
    trainer, average = make(), WeightAverage()
    with torch.inference_mode():
        trainer.train(1, verbose=False, callback=average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(1, verbose=False, callback=average)


@pytest.mark.parametrize(
    "decay, error, text",
    [
        (1.0, ValueError, "decay must be below 1, got 1"),
        (-0.1, ValueError, "decay must be a finite number of at least 0, got -0.1"),
        (float("nan"), ValueError, "decay must be a finite number of at least 0, got nan"),
        ("0.9", TypeError, "decay must be a number, got str '0.9'"),
        (None, TypeError, "decay must be a number, got NoneType None"),
    ],
)
def test_bad_input(decay: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        WeightAverage(decay)


def test_there_is_none_before_a_run() -> None:
    average = WeightAverage()
    with pytest.raises(RuntimeError, match="there is no average yet"):
        average.parameters  # noqa: B018
    trainer = make()
    average.on_start(trainer)
    # Then it is the model's own weights.
    assert average.parameters == {}
    assert_same(dict(average.model.named_parameters()), dict(trainer.model.named_parameters()))


BODY = """
from eggroll_trainer.callbacks import WeightAverage

trainer, average = make(EGGROLLTrainer, ENGINE, noise_reuse=2), WeightAverage(0.8)
trainer.train(3, verbose=False, callback=average)
trainer.save(FOLDER + "/run.pt")
again, resumed = make(EGGROLLTrainer, ENGINE, noise_reuse=2), WeightAverage(0.8)
again.load(FOLDER + "/run.pt")
again.train(2, verbose=False, callback=resumed)
say(trainer.checksum(), again.checksum())
if again.is_main:
    say([value.double().sum().item() for one in (average, resumed) for value in one.parameters.values()])
"""


def test_two_processes_give_the_average_of_one(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    script = alone / "script.py"
    script.write_text(
        "from engine_cases import *\ntorch.set_num_threads(1)\n"
        f"say, ENGINE, FOLDER = print, 'local', {str(alone)!r}\n" + BODY
    )
    expected = python(script).splitlines()
    body = f"ENGINE, FOLDER = ProcessGroupEngine(check_every=1), {str(shared)!r}\n" + BODY
    said = run_script(2, shared, body)
    assert said == [expected, expected[:1]]
