"""Everything that the rest of a run depends on: to keep, to restore, to compare, and to send to a copy."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .checkpoint import FORMAT, check_format, check_same_run, plain_copy, read_checkpoint, untrained, write_checkpoint
from .distributed.engine import Engine, LocalEngine
from .fitness.findings import Findings
from .fitness.learning import Learner, learner_state, set_learner_state
from .fitness.scores import METRICS
from .interrupts import delayed_interrupt
from .optimizer_face import OptimizerFace
from .update.centre import Centre
from .update.schedule import LRSchedulerFactory, Schedules
from .warned import Warned


class Generation(NamedTuple):
    """What it takes to make the step of a generation again.

    Attributes:
        number: Counted from 1.
        seed: Of the run.
        options: Of the parameter groups, as they were during it.
        scores: ``[N]`` in float64, as they came from the fitness function.
        statistics: What each chunk has shown to a fitness function that learns along the way.
    """

    number: int
    seed: int
    options: list[dict[str, Any]]
    scores: Tensor
    statistics: list[Tensor]


class RunState(OptimizerFace):
    """The state of a trainer.

    Attributes:
        last_generation: The generation that ended last, or None.
    """

    model: nn.Module
    fitness_fn: Any
    device: torch.device
    engine: Engine
    population_size: int
    generation: int
    best_fitness: float
    history: dict[str, list[Any]]
    last_generation: Generation | None
    _seed: int
    _centre: Centre
    _schedulers: tuple[LRSchedulerFactory | None, LRSchedulerFactory | None]
    _schedules: Schedules
    _learner: Learner | None
    _initial: Tensor
    _initial_untrained: dict[str, Tensor]
    _best: Tensor | None
    _best_untrained: dict[str, Tensor]
    _warned: Warned
    _findings: Findings

    @property
    def is_main(self) -> bool:
        """Whether this is the only process, or the first of those that run the script: the one to print and write."""
        return self.engine.rank == 0

    def _warn_once(self, message: str, kind: str | None = None) -> None:
        """Warn of what all processes notice, or have been told of."""
        if self.is_main:
            self._warned.once(message, kind)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, as copies: tensors, numbers and strings."""
        state = {
            "format": FORMAT,
            "settings": self.settings(),
            "seed": self._seed,
            "generation": self.generation,
            "centre": self._centre.state_dict(),
            "untrained": self._untrained(),
            "initial_params": self._initial,
            "history": self.history,
            "best_fitness": self.best_fitness,
            "best_params": self._best,
            "best_untrained": self._best_untrained,
            "initial_untrained": self._initial_untrained,
            "learner": learner_state(self._learner),
            "alone": self._findings.alone,
            **self._schedules.state_dict(),
        }
        return cast(dict[str, Any], plain_copy(state))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, of a trainer of the same model made with the same arguments.

        Raises:
            ValueError: The state is of another model, another kind of trainer, or not of a trainer. This one is left
                as it was.
        """
        check_format(state_dict, "state_dict")
        before = self.state_dict()
        changed = check_same_run(state_dict, before)
        if changed:
            self._warn_once(
                f"going on with {', '.join(changed)}: the numbers will not be those of an uninterrupted run",
            )
        with delayed_interrupt():
            try:
                self._restore(state_dict)
            except Exception as error:
                self._restore(before)
                raise ValueError(f"the state does not fit this trainer: {error!r}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint; the file at ``path`` is at any moment either the old one or the whole new one.

        Of several processes the first one writes.
        """
        if self.is_main:
            write_checkpoint(self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Go on from a checkpoint, exactly as if the run had not been stopped. Runs no code from the file.

        Of several processes, all of which must call this, the first one reads.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, is not a checkpoint, or is one of another model. Nothing has changed.
        """
        self.load_state_dict(self.engine.from_main(lambda: read_checkpoint(path)))

    # What processes that share a generation compare.

    def fingerprint(self) -> dict[str, Any]:
        """Return, by name, what must be the same for all who take part in the current generation."""
        return {
            "generation": self.generation,
            "seed": self._seed,
            "population_size": self.population_size,
            "options": repr(self._options()),
        }

    def checksum(self) -> int:
        """Return a number that tells parameters apart that differ in any bit."""
        total = 0
        for name, value in self._centre.state_dict()["parameters"].items():
            bits = value.flatten().view(torch.int64 if value.itemsize == 8 else torch.int32).long()
            # Odd weights that differ from place to place; sums wrap around and so don't depend on their order.
            places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
            total = (31 * total + len(name) + int((bits * places).sum())) % 2**64
        return total

    # What a copy of the trainer in another process needs from generation to generation.

    def working_state(self) -> dict[str, Any]:
        """Return what changes from generation to generation and outcomes depend on, for a copy of the trainer."""
        return {
            "seed": self._seed,
            "generation": self.generation,
            "population_size": self.population_size,
            "options": self._options(),
            "learner": learner_state(self._learner),
            "alone": self._findings.alone,
            "trained": {name: _to_numpy(value.detach()) for name, value in self._centre.parameters.items()},
            "untrained": {name: _to_numpy(value.detach()) for name, value in self._untrained().items()},
        }

    @torch.no_grad()
    def set_working_state(self, state: dict[str, Any]) -> None:
        """Take over the :meth:`working_state` of the trainer that this one is a copy of, to evaluate its chunks."""
        self._seed, self.generation = state["seed"], state["generation"]
        self.population_size = state["population_size"]
        self._set_options(state["options"])
        arrays = {**state["trained"], **state["untrained"]}
        for name, value in self._tensors().items():
            _copy_from_numpy(value, arrays[name])
        set_learner_state(self._learner, state["learner"])
        self._findings.decide(state["alone"])
        self._restart_noise()
        self._begin_generation()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickle or a deep copy; schedulers are made anew, and the engine is local."""
        left_out = ("step", "engine", "_forwards", "_kept", "_sampled")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return {**state, "_schedules": plain_copy(self._schedules.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` gave."""
        self.__dict__.update(state)
        self.engine = LocalEngine()
        self._restart_forwards()
        self._schedules = Schedules(self, *self._schedulers)
        self._schedules.load_state_dict(state["_schedules"])
        self._restart_noise()

    def _options(self) -> list[dict[str, Any]]:
        """Return the live options of the parameter groups."""
        return [{k: v for k, v in group.items() if k not in ("params", "names")} for group in self.param_groups]

    def _set_options(self, options: Sequence[dict[str, Any]]) -> None:
        """Take over what :meth:`_options` returned."""
        for group, own in zip(self.param_groups, options, strict=True):
            group.update(own)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the model's parameters and buffers, trained or not."""
        return {**self._centre.parameters, **self._untrained()}

    def _untrained(self) -> dict[str, Tensor]:
        return untrained(self.model, self._centre.parameters)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments, besides those in the parameter groups, that the numbers of a run depend on."""

    def _restore(self, state: dict[str, Any]) -> None:
        self._centre.load_state_dict(state["centre"])
        self._schedules.load_state_dict(state)
        self._set_learnt(state["untrained"])
        set_learner_state(self._learner, state.get("learner"))
        self._initial = state["initial_params"].to(self.device, copy=True)
        self._initial_untrained = plain_copy(state["initial_untrained"])
        self._best_untrained = plain_copy(state["best_untrained"])
        self._seed, self.generation = state["seed"], state["generation"]
        self._findings = Findings(state.get("alone"))
        self.history, self.last_generation = copy.deepcopy(state["history"]), None
        self.best_fitness = state["best_fitness"]
        self._best = None if state["best_params"] is None else state["best_params"].to(self.device, copy=True)
        self._restart_noise()

    def _forget(self) -> None:
        self.generation, self.last_generation = 0, None
        self.history = {key: [] for key in METRICS}
        self.best_fitness = float("-inf")
        self._best, self._best_untrained = None, {}
        self._findings = Findings()
        self._restart_noise()

    def _learnt(self) -> dict[str, Tensor]:
        """Return copies of the buffers and untrained parameters, if the fitness function may change them."""
        return {} if self._learner is None else plain_copy(self._untrained())

    @torch.no_grad()
    def _set_learnt(self, values: dict[str, Tensor]) -> None:
        for name, value in self._untrained().items():
            value.copy_(values.get(name, value))

    @abstractmethod
    def _restart_noise(self) -> None:
        """Forget what is kept of random streams."""

    @abstractmethod
    def _begin_generation(self) -> None:
        """Get ready for the evaluation of chunks."""

    @abstractmethod
    def _restart_forwards(self) -> None:
        """Forget what is known of the model's forwards."""


def _to_numpy(value: Tensor) -> Any:
    # NumPy has no bfloat16; its bits will do.
    value = value.cpu()
    return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _copy_from_numpy(target: Tensor, value: Any) -> None:
    # What lies in shared memory cannot be written to, which torch warns of.
    source = torch.from_numpy(value.copy())
    target.copy_(source.view(torch.bfloat16) if target.dtype == torch.bfloat16 else source)
