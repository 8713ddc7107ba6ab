"""Everything that the rest of a run depends on: to keep, to restore, to compare, and to send to a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .._utils.copies import plain_copy
from .._utils.interrupts import delayed_interrupt
from .._utils.validation import check_int
from .._utils.warned import Warned
from ..checkpoints.files import FORMAT, check_format, check_same_model, read_checkpoint, write_checkpoint
from ..checkpoints.generation import Generation, Settings, adopt, differences
from ..diagnostics import Watch
from ..distributed.engine import Engine, LocalEngine
from ..fitness.findings import Findings
from ..fitness.learning import Learner, changes_model, learner_state, set_learner_state
from ..fitness.scores import METRICS
from ..plotting import RunCurves, plot_runs
from ..plotting.styles import Style
from ..population.untrained import set_untrained, untrained
from ..update.centre import Centre
from ..update.schedule import LRSchedulerFactory, Schedules
from .extra_state import ExtraState, lost_warning
from .method import Method
from .plateau import PlateauWatch
from .retest import Retest
from .told import Told
from .trainable import padding_rows, set_frozen


class RunState(ABC):
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
    _trained: tuple[str, ...]
    _schedulers: tuple[LRSchedulerFactory | None, LRSchedulerFactory | None]
    _schedules: Schedules
    _learner: Learner | None
    _warned: Warned
    _findings: Findings
    _watch: Watch
    _method: Method
    _extra: ExtraState
    _retest: Retest
    _plateau: PlateauWatch
    _maximize: bool
    # The settings of the generation that was asked for, and the scores that came in since.
    _asked: dict[str, Any] | None
    _told: Told | None
    param_groups: list[dict[str, Any]]

    @property
    def is_main(self) -> bool:
        """Whether this is the only process, or the first of those that run the script: the one to print and write."""
        return self.engine.rank == 0

    @property
    def maximize(self) -> bool:
        """Whether higher fitness is better, as it was given at construction."""
        return self._maximize

    @property
    def seed(self) -> int:
        """Seed of the run; a new one holds from the next generation on."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = check_int("seed", value, -(2**63))
        self._method.restart()

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """What ``lr_scheduler=`` made."""
        return self._schedules.lr_scheduler

    @property
    def status(self) -> str | None:
        """Traffic light: green while it learns, yellow where that cannot be told from noise, red after a warning."""
        return self._watch.status(self.history)

    @property
    def current_params(self) -> Tensor:
        """A copy of the centre's trained parameters, ``[D]``, in float32 or wider."""
        return self._centre.flat()

    @property
    def initial_params(self) -> Tensor:
        """A copy of the parameters that training started from, ``[D]``."""
        return self._initial.clone()

    @property
    def fitness_history(self) -> list[float]:
        """The mean fitness of every generation up to now: the list that callbacks get."""
        return list(self.history.get("mean_fitness", []))

    def register_state(self, name: str, value: Any, *, persistent: bool = True) -> None:
        """Set an attribute that belongs to the state of the run, as ``register_buffer`` does for a module.

        It is kept by :meth:`state_dict` and :meth:`save`, comes back by :meth:`load`, goes back to ``value`` by
        :meth:`reset`, and reaches the processes of an engine. If a generation fails, it is what it was before. Read it
        as ``self.name``, assign to that or change it in place, in ``compute_update``.

        Args:
            name: Of the attribute.
            value: Its first value: a tensor, a number, a string, None, or a list, tuple or dictionary of these.
            persistent: Whether it is kept. What is computed anew in every generation need not be.

        Raises:
            RuntimeError: ``super().__init__()`` has not been called yet.
            TypeError: A checkpoint could not hold the value.
            ValueError: The name is taken.

        Example:
            >>> from eggroll_trainer import ESTrainer
            >>> class Separable(ESTrainer):
            ...     def __init__(self, *args, **kwargs):
            ...         super().__init__(*args, **kwargs)
            ...         self.register_state("scales", torch.ones_like(self.current_params))
            ...
            ...     def sample_perturbations(self, population_size):
            ...         return torch.randn(population_size, len(self.scales)) * self.scales * self.sigma
            ...
            ...     def compute_update(self, perturbations, fitnesses):
            ...         weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
            ...         self.scales *= (0.05 * (weights[:, None] * (perturbations != 0)).mean(0)).exp()
            ...         return (weights[:, None] * perturbations).mean(0)
            >>> model = nn.Linear(3, 1)
            >>> trainer = Separable(model=model, fitness_fn=lambda m: m(torch.ones(1, 3)).item(), seed=0)
            >>> _ = trainer.step()
            >>> sorted(trainer.state_dict()["extra"])
            ['scales']
        """
        if not hasattr(self, "_extra"):
            raise RuntimeError("register_state() before super().__init__(): call that first")
        self._extra.register(self, name, value, persistent=persistent)

    def _note_beginning(self) -> None:
        """Note what :meth:`reset` goes back to."""
        self._initial_options = self._options()
        self._initial, self._initial_untrained = self._centre.flat(), self._learnt()
        self._initially_held = list(self._centre.parameters)
        self._best: Tensor | None = None
        self._best_untrained: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Go back to the initial parameters and options, and forget history and optimizer state."""
        with delayed_interrupt():
            for group, options in zip(self.param_groups, self._initial_options, strict=True):
                for key in group.keys() - {"params", "names"}:
                    del group[key]
                group.update(options)
            self._centre.assign(self._initial)
            self.set_frozen([name for name in self._centre.candidates if name not in self._initially_held])
            self._hold(self._initially_held)
            self._follow_frozen()
            self._set_learnt(self._initial_untrained)
            self._centre.restart()
            self._schedules = Schedules(cast(torch.optim.Optimizer, self), *self._schedulers)
            self._warn_of_lost()
            self._extra.restore(self, self._extra.initial)
            self._forget()

    def _notice(self) -> None:
        """Notice, at the start of a generation, what the user's own code does."""
        self._extra.note(self)
        plateau = self._plateau.warning(self)
        if plateau is not None:
            self._warn_once(plateau, "plateau")

    def _warn_of_lost(self) -> None:
        """Warn of tensors that a subclass has changed and not registered."""
        # Attributes that were set on a trainer of ours from outside are not for the algorithm.
        lost = [] if type(self).__module__.startswith("eggroll_trainer.") else self._extra.lost(self)
        if lost:
            self._warn_once(lost_warning(type(self).__name__, lost), "lost")

    def _warn_once(
        self, message: str, kind: str | None = None, category: type[RuntimeWarning] = RuntimeWarning
    ) -> None:
        """Warn of what all processes notice, or have been told of."""
        if self.is_main:
            self._warned.once(message, kind, category)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, as copies: tensors, numbers and strings."""
        self._warn_of_lost()
        state = {
            "format": FORMAT,
            "settings": self.settings().plain(),
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
            "last_step": self._watch.agreement.step,
            "differs": self._findings.differs,
            "retest": self._retest.state(),
            "told": None if self._told is None else self._told.state(),
            "extra": self._extra.values(self),
            "initial_extra": self._extra.initial,
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
        try:
            # A forward may have given a buffer another shape.
            check_same_model(state_dict, before, resizable=dict(self.model.named_buffers()))
            changed = self._changed_settings(state_dict)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the state of the trainer is incomplete or damaged: {error!r}") from error
        missing = self._extra.initial.keys() - state_dict.get("extra", {}).keys()
        if missing:
            self._warn_once(
                f"the checkpoint has no {', '.join(sorted(missing))}, which were not registered when it was written:"
                " they stay as they are",
            )
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

    def plot(self, path: str | PathLike[str] | None = None, *, style: Style = "light", title: str = "") -> Any:
        """Plot the fitness of the run, and every other number in ``history`` that changes.

        :func:`eggroll_trainer.plotting.plot_runs` compares several runs.

        Args:
            path: Where the figure goes, as PNG, SVG or PDF; it is only returned if None.
            style: ``"light"``, ``"dark"`` for dark pages, or ``"print"`` without colours.
            title: Of the figure.

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: No generation was made yet, or there is no such style or kind of file.
        """
        if not self.generation:
            raise ValueError("there is nothing to plot yet: train a generation first")
        return plot_runs([RunCurves.of_history("run", self.history)], path, style=style, title=title)

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
        settings = self.settings()
        # Tensors among the options cannot be compared as a whole.
        return {"generation": self.generation, **settings.plain(), "options": repr(settings.options)}

    def checksum(self) -> int:
        """Return a number that tells parameters apart that differ in any bit."""
        total = 0
        for name, value in self._centre.state_dict()["parameters"].items():
            bits = value.flatten().view(torch.int64 if value.itemsize == 8 else torch.int32).long()
            # Odd weights that differ from place to place; sums wrap around and so don't depend on their order.
            places = 2 * torch.arange(len(bits), device=bits.device) + 1
            total = (31 * total + len(name) + int((bits * places).sum())) % 2**64
        return total

    # What a copy of the trainer in another process needs from generation to generation.

    def working_state(self) -> dict[str, Any]:
        """Return what changes from generation to generation and outcomes depend on, for a copy of the trainer."""
        return {
            "generation": self.generation,
            "settings": self.settings().plain(),
            "learner": learner_state(self._learner),
            "alone": self._findings.alone,
            "extra": plain_copy(self._extra.values(self)),
            "trained": {name: _to_numpy(value.detach()) for name, value in self._centre.parameters.items()},
            "untrained": {
                name: _to_numpy(value.detach())
                for name, value in untrained(self.model, self._centre.parameters, persistent=False).items()
            },
        }

    @torch.no_grad()
    def set_working_state(self, state: dict[str, Any]) -> None:
        """Take over the :meth:`working_state` of the trainer that this one is a copy of, to evaluate its chunks."""
        self.generation = state["generation"]
        compiled = self.settings().compile
        # Members are not shaped here.
        adopt(self, {name: value for name, value in state["settings"].items() if name != "shaping"})
        if self.settings().compile != compiled:
            self._restart_forwards()
        self._hold(state["trained"])
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        arrays = {**state["trained"], **state["untrained"]}
        # Caches that a forward has made since are made here as well.
        set_untrained(
            self.model,
            {name: _from_numpy(array, tensors[name].dtype) for name, array in arrays.items() if name in tensors},
        )
        set_learner_state(self._learner, state["learner"])
        self._findings.decide(state["alone"])
        self._extra.restore(self, state["extra"])
        self._method.restart()
        self._follow_frozen()
        self._method.begin_generation()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickle or a deep copy; schedulers are made anew, and the engine is local."""
        left_out = ("step", "engine", "_forwards", "_method")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return {**state, "_schedules": plain_copy(self._schedules.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` gave."""
        self.__dict__.update(state)
        self.engine = LocalEngine()
        self._restart_forwards()
        self._schedules = Schedules(cast(torch.optim.Optimizer, self), *self._schedulers)
        self._schedules.load_state_dict(state["_schedules"])
        self._method = self._make_method()

    def _options(self) -> list[dict[str, Any]]:
        """Return the live options of the parameter groups."""
        return [{k: v for k, v in group.items() if k not in ("params", "names")} for group in self.param_groups]

    # Which parameters are trained.

    def set_frozen(self, names: Collection[str]) -> None:
        """Freeze the parameters of these names, ``requires_grad=False``, and free all others that were given."""
        set_frozen(self._centre.candidates, names)

    def _follow_frozen(self) -> None:
        """Find out which parameters and rows the next generation trains."""
        trained = tuple(name for name, p in self._centre.candidates.items() if p.requires_grad)
        self._hold({*self._centre.parameters, *trained})
        self._trained = trained
        rows = padding_rows(self.model)
        self._centre.fixed_rows = {name: rows[id(p)] for name, p in self._centre.candidates.items() if id(p) in rows}

    def _hold(self, names: Collection[str]) -> None:
        """Let the centre hold these parameters: all that is kept of flat parameters follows."""
        centre = self._centre
        if centre.parameters.keys() == set(names):
            return
        initial = centre.unflatten(self._initial)
        best = None if self._best is None else centre.unflatten(self._best)
        centre.hold(names)
        # What has been frozen is what it was in the beginning, and in every member.
        current = centre.unflatten(centre.flat())
        self._initial = centre.flatten({**current, **initial})
        self._best = None if best is None else centre.flatten({**current, **best})

    def _untrained(self) -> dict[str, Tensor]:
        return untrained(self.model, self._centre.parameters)

    def settings(self) -> Settings:
        """Return the record of what the numbers of the next generation depend on."""
        return Settings(**self._settings())

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the values of the record."""

    def _changed_settings(self, state: dict[str, Any]) -> list[str]:
        """Return, in words, the settings that a state does not bring along and that are others than it was made with.

        Raises:
            ValueError: They are those of another kind of trainer.
        """
        restored = ("seed", "options", "frozen", "optimizer_options")
        changed = differences(self.settings().plain(), state["settings"], restored)
        if not changed.keys().isdisjoint(("trainer", "optimizer", "lr_scheduler", "sigma_scheduler", "maximize")):
            raise ValueError(
                f"the checkpoint is of another kind of trainer; this one has {', '.join(changed.values())}"
            )
        return list(changed.values())

    def _restore(self, state: dict[str, Any]) -> None:
        self._centre.load_state_dict(state["centre"])
        self.set_frozen(state["settings"]["frozen"])
        self._schedules.load_state_dict(state)
        self._set_learnt(state["untrained"])
        set_learner_state(self._learner, state.get("learner"))
        self._initial = state["initial_params"].to(self.device, copy=True)
        self._initial_untrained = plain_copy(state["initial_untrained"])
        self._best_untrained = plain_copy(state["best_untrained"])
        self._seed, self.generation = state["seed"], state["generation"]
        self._findings = Findings(state.get("alone"), differs=state.get("differs", False))
        self._retest = Retest.of(state.get("retest"))
        self._asked, self._told = None, Told.of(state.get("told"))
        self._extra.restore(self, state.get("extra", {}), state.get("initial_extra"))
        self._watch = Watch(state.get("last_step"))
        self.history, self.last_generation = plain_copy(state["history"]), None
        self.best_fitness = state["best_fitness"]
        self._best = None if state["best_params"] is None else state["best_params"].to(self.device, copy=True)
        self._follow_frozen()
        self._method.restart()

    def _forget(self) -> None:
        self.generation, self.last_generation = 0, None
        self.history = {key: [] for key in METRICS}
        self.best_fitness = float("-inf" if self.maximize else "inf")
        self._retest, self._plateau = Retest(), PlateauWatch()
        self._best, self._best_untrained = None, {}
        self._findings, self._watch = Findings(), Watch()
        self._asked = self._told = None
        self._method.restart()

    def _learnt(self) -> dict[str, Tensor]:
        """Return copies of the buffers and untrained parameters, if the fitness function may change them."""
        return plain_copy(self._untrained()) if changes_model(self._learner) else {}

    def _set_learnt(self, values: dict[str, Tensor]) -> None:
        set_untrained(
            self.model, {name: value for name, value in values.items() if name not in self._centre.parameters}
        )

    @abstractmethod
    def _make_method(self) -> Method:
        """Return how members are perturbed, and how the update follows from their fitness."""

    @abstractmethod
    def _restart_forwards(self) -> None:
        """Forget what is known of the model's forwards."""


def _to_numpy(value: Tensor) -> Any:
    # NumPy has no bfloat16; its bits will do.
    value = value.cpu()
    return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _from_numpy(array: Any, dtype: torch.dtype) -> Tensor:
    # What lies in shared memory cannot be written to, which torch warns of.
    value = torch.from_numpy(array.copy())
    return value.view(torch.bfloat16) if dtype == torch.bfloat16 else value
