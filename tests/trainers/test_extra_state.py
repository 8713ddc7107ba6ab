"""State that a subclass adds: kept where it is registered, noticed where it is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, fitness, goes_on, network

from eggroll_trainer import ESTrainer


def plain_fitness(model: torch.nn.Module) -> float:
    return -model(torch.ones(1, 4)).square().sum().item()


class Separable(ESTrainer):
    """One deviation for each weight, which follows the fitness; and a counter."""

    registered = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scales: torch.Tensor
        self.seen: list[Any]
        if self.registered:
            self.register_state("scales", torch.ones_like(self.current_params))
            self.register_state("seen", [0, {"mean": torch.zeros(2)}])
        else:
            self.scales, self.seen = torch.ones_like(self.current_params), [0, {"mean": torch.zeros(2)}]

    def sample_perturbations(self, population_size: int) -> torch.Tensor:
        return torch.randn(population_size, len(self.scales)) * self.scales * self.sigma

    def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
        weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        self.seen[0] += 1
        self.seen[1]["mean"] += fitnesses.mean()
        self.scales *= (0.1 * (weights[:, None] * (perturbations.square() - 1)).mean(0)).exp()
        return (weights[:, None] * perturbations).mean(0)


class Forgetful(Separable):
    registered = False


def make(cls: type[ESTrainer] = Separable, **options: Any) -> Any:
    return cls(
        model=network(), **{"fitness_fn": fitness, "population_size": 8, "learning_rate": 0.1, "seed": 1, **options}
    )


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    trainer, twin = make(), make()
    trainer.train(3, verbose=False)
    trainer.save(tmp_path / "a.pt")
    twin.load(tmp_path / "a.pt")
    assert twin.seen[0] == 3 and torch.equal(twin.scales, trainer.scales)
    goes_on(trainer, twin)
    # What is loaded belongs to the one who loaded it.
    assert not torch.equal(twin.scales, torch.ones_like(twin.scales))
    trainer.scales.zero_()
    assert twin.scales.count_nonzero() == len(twin.scales)


def test_reset_goes_back_to_the_first_value() -> None:
    trainer, twin = make(), make()
    trainer.train(3, verbose=False)
    trainer.reset()
    goes_on(trainer, twin)
    trainer.reset()
    assert torch.equal(trainer.scales, torch.ones_like(trainer.scales)) and trainer.seen[0] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_copies_have_their_own(copied: Any) -> None:
    trainer = make(fitness_fn=plain_fitness)
    trainer.step()
    goes_on(trainer, copied(trainer))


def test_a_generation_that_fails_leaves_it_as_it_was() -> None:
    trainer, twin = make(optimizer=torch.optim.Adam), make(optimizer=torch.optim.Adam)
    trainer.step(), twin.step()
    before = trainer._centre.optimizer.step

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no step")

    trainer._centre.optimizer.step = fails
    with pytest.raises(OSError, match="no step"):
        trainer.step()
    trainer._centre.optimizer.step = before
    goes_on(trainer, twin)


def test_a_copy_in_another_process_gets_it() -> None:
    trainer, worker = make(), make()
    trainer.train(2, verbose=False)
    worker.set_working_state(pickle.loads(pickle.dumps(trainer.working_state())))
    assert torch.equal(worker.scales, trainer.scales)
    # The members are those of the trainer.
    x = torch.randn(2, 4)
    assert torch.equal(worker._evaluator.population(0, 8)(x), trainer.ask()(x))


def test_registered_when_it_is_first_used(tmp_path: Path) -> None:
    class Lazy(Forgetful):
        def sample_perturbations(self, population_size: int) -> torch.Tensor:
            if not hasattr(self, "basis"):
                self.register_state("basis", torch.eye(2))
            self.basis: torch.Tensor
            return super().sample_perturbations(population_size)

        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            self.basis = self.basis + 1
            return fitnesses @ perturbations / len(fitnesses)

    trainer, twin = make(Lazy), make(Lazy)
    trainer.train(2, verbose=False)
    trainer.save(tmp_path / "a.pt")
    twin.load(tmp_path / "a.pt")
    assert torch.equal(twin.basis, torch.eye(2) + 2)
    goes_on(trainer, twin)
    twin.reset()
    assert torch.equal(twin.basis, torch.eye(2))


def test_a_checkpoint_from_before_it_was_registered() -> None:
    state = make(Forgetful).state_dict()
    trainer = make()
    trainer.step()
    state["settings"]["trainer"] = "Separable"
    with pytest.warns(RuntimeWarning, match="the checkpoint has no scales, seen"):
        trainer.load_state_dict(state)
    assert trainer.seen[0] == 1


def test_of_another_shape() -> None:
    trainer = make()
    state = trainer.state_dict()
    state["extra"]["scales"] = torch.ones(3)
    before = trainer.state_dict()
    with pytest.raises(ValueError, match=r"scales has shape \[3\] in the state"):
        trainer.load_state_dict(state)
    assert_same(trainer.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("sigma", 1.0, ValueError, "'sigma' is an attribute of every trainer"),
        ("history", 1.0, ValueError, "'history' is an attribute of every trainer"),
        ("scales", 1.0, ValueError, "registered already: assign to self.scales"),
        ("a b", 1.0, TypeError, "must be the name of an attribute"),
        ("path", np.zeros(3), TypeError, r"torch.from_numpy\(array\)"),
        ("path", {"a": [object()]}, TypeError, "path is a object, which checkpoints cannot hold"),
    ],
)
def test_what_cannot_be_registered(name: str, value: Any, error: type[Exception], text: str) -> None:
    trainer = make()
    with pytest.raises(error, match=text):
        trainer.register_state(name, value)
    trainer.step()


def test_before_the_constructor() -> None:
    class Early(Separable):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.register_state("early", 1)

    with pytest.raises(RuntimeError, match=r"super\(\).__init__\(\)"):
        make(Early)


def test_what_nobody_saves_is_noticed(tmp_path: Path) -> None:
    trainer = make(Forgetful)
    # Nothing has changed yet.
    trainer.save(tmp_path / "a.pt")
    trainer.step()
    with pytest.warns(RuntimeWarning, match=r"Forgetful has changed scales during training.*register_state\('scales'"):
        trainer.save(tmp_path / "a.pt")
    trainer.save(tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="has changed scales"):
        (other := make(Forgetful)).step(), other.reset()


def test_arrays_and_new_tensors_are_noticed() -> None:
    class Own(Forgetful):
        path: np.ndarray[Any, Any]

        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            self.path[0] += 1
            self.momentum = perturbations.mean(0)
            return self.momentum

    trainer: Any = make(Own)
    trainer.path = np.zeros(3)
    trainer.step()
    with pytest.warns(RuntimeWarning, match="path, momentum"):
        trainer.state_dict()


def test_constants_and_what_is_not_kept_on_purpose_are_not() -> None:
    class Own(Separable):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inputs = torch.ones(3)
            super().__init__(*args, **kwargs)
            self.array, self.parts = np.zeros(3), {"a": torch.zeros(2), "b": [1]}
            self.register_state("last", None, persistent=False)

        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            self.last = fitnesses
            return super().compute_update(perturbations, fitnesses)

    trainer = make(Own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(2, verbose=False)
        assert "last" not in trainer.state_dict()["extra"]
        trainer.reset()
