"""Buffers and frozen parameters in checkpoints: caches are not kept, and a buffer may have changed its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import X, assert_same, goes_on, make
from torch import Tensor, nn

from eggroll_trainer import Population, batched
from eggroll_trainer.population.untrained import set_untrained, untrained


class Masked(nn.Module):
    """Makes a buffer anew for every size of batch, a cache or not."""

    mask: Tensor
    scale: Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(4, 2)
        self.register_buffer("mask", torch.ones(1, 1), persistent=persistent)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.mask.shape[0] != x.shape[0]:
            self.mask = torch.full((x.shape[0], 1), 0.5)
        return self.net(x) * self.mask * self.scale


def score(model: nn.Module) -> float:
    return -model(X).double().square().mean().item()


def trainer(persistent: bool, **options: Any) -> Any:
    return make(model=Masked(persistent), **{"fitness_fn": score, "coalesce": False, **options})


@pytest.mark.filterwarnings("ignore:the fitness function changes buffer mask:RuntimeWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_a_forward_reshapes_does_not_stop_a_resume(persistent: bool, tmp_path: Path) -> None:
    run, other = trainer(persistent), trainer(persistent)
    run.train(2, verbose=False)
    run.model(X)
    run.save(tmp_path / "run.pt")
    other.load(tmp_path / "run.pt")
    assert ("mask" in run.state_dict()["untrained"]) == persistent
    assert other.model.mask.shape == ((24, 1) if persistent else (1, 1))
    goes_on(run, other)
    # The other way round as well.
    fresh = trainer(persistent).state_dict()
    run.load_state_dict(fresh)
    assert_same(run.state_dict(), fresh)


def test_a_shared_module_is_left_out_under_all_its_names() -> None:
    model = nn.Module()
    model.one = model.two = Masked(persistent=False)
    assert set(untrained(model, ())) == {"one.scale", "one.net.weight", "one.net.bias"}
    assert set(untrained(model, ["one.net.weight"], persistent=False)) == {"one.scale", "one.net.bias", "one.mask"}


def test_other_shapes_of_parameters_and_missing_buffers_are_other_models() -> None:
    state = trainer(True).state_dict()
    for name, value in (("mask", None), ("net.weight", torch.ones(3, 4))):
        changed = {**state, "untrained": dict(state["untrained"]), "centre": {**state["centre"]}}
        changed["centre"]["parameters"] = dict(state["centre"]["parameters"])
        place = changed["centre"]["parameters"] if "net" in name else changed["untrained"]
        if value is None:
            del place[name]
        else:
            place[name] = value
        with pytest.raises(ValueError, match=f"the checkpoint is of another model: 1 .* the first is '{name}'"):
            trainer(True).load_state_dict(changed)


def test_values_for_tensors_that_are_not_there() -> None:
    model = Masked(persistent=True)
    for name in ("gone", "net.gone", "net.weight"):
        with pytest.raises(ValueError, match=f"the model has no buffer '{name}', nor a parameter of shape"):
            set_untrained(model, {name: torch.ones(7)})


def test_a_learner_that_reshapes_a_buffer() -> None:
    class Growing:
        def __init__(self) -> None:
            batched(self)

        def __call__(self, population: Population) -> Tensor:
            return -population(X).square().mean((1, 2))

        def pop_statistics(self) -> Tensor:
            return torch.zeros(1)

        def merge_statistics(self, model: Any, statistics: Any) -> None:
            model.scale = torch.cat([model.scale, torch.ones(1)])
            if self.fails:
                raise ArithmeticError

        fails = False

    class Scaled(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale.mean()

    run, other = (make(model=Scaled(False), fitness_fn=Growing()) for _ in range(2))
    run.train(2, verbose=False)
    assert run.model.scale.shape == (3,)
    run.fitness_fn.fails = True
    with pytest.raises(ArithmeticError):
        run.step()
    assert run.model.scale.shape == (3,)
    run.fitness_fn.fails = False
    other.load_state_dict(run.state_dict())
    goes_on(run, other)
    assert run.get_best_model().scale.ndim == 1
    run.reset()
    assert run.model.scale.shape == (1,)


def test_an_engines_copy_gets_caches_too() -> None:
    run, copied = trainer(False), trainer(False)
    run.model.mask = torch.full((24, 1), 0.25)
    run.model.scale.fill_(3)
    copied.set_working_state(run.working_state())
    assert torch.equal(copied.model.mask, run.model.mask) and torch.equal(copied.model.scale, run.model.scale)
