"""The state of a run: how it is saved, restored, compared, and sent to other processes."""

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
from .diagnosed import Diagnosed
from .extra_state import ExtraState, unregistered_warning
from .method import Method
from .plateau import PlateauWatch
from .retest import Retest
from .told import ToldScores
from .trainable import padding_rows, set_frozen


class RunState(Diagnosed, ABC):
    """Base class of trainers that holds the state of the run.

    Attributes:
        last_generation: The last completed generation, or None.
    """

    model: nn.Module
    fitness_fn: Any
    device: torch.device
    engine: Engine
    population_size: int
    generation: int
    best_fitness: float
    last_generation: Generation | None
    _seed: int
    _centre: Centre
    _trained: tuple[str, ...]
    _schedulers: tuple[LRSchedulerFactory | None, LRSchedulerFactory | None]
    _schedules: Schedules
    _learner: Learner | None
    _warned: Warned
    _findings: Findings
    _method: Method
    _extra: ExtraState
    _retest: Retest
    _plateau: PlateauWatch
    _maximize: bool
    # The settings of the generation that ask() returned, and the scores that tell() has received.
    _asked: dict[str, Any] | None
    _told: ToldScores | None
    param_groups: list[dict[str, Any]]

    @property
    def is_main(self) -> bool:
        """Whether this is the only or the first process of the script: the one that prints and writes files."""
        return self.engine.rank == 0

    @property
    def maximize(self) -> bool:
        """Whether higher fitness is better."""
        return self._maximize

    @property
    def seed(self) -> int:
        """Seed of the run. A new value takes effect in the next generation."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = check_int("seed", value, -(2**63))
        self._method.restart()

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The scheduler that ``lr_scheduler=`` made, or None."""
        return self._schedules.lr_scheduler

    @property
    def current_params(self) -> Tensor:
        """A copy of the centre's trained parameters, ``[D]``, in float32 or wider."""
        return self._centre.flat()

    @property
    def initial_params(self) -> Tensor:
        """A copy of the parameters that training started from, ``[D]``, in float32 or wider."""
        return self._initial.to(torch.promote_types(self._initial.dtype, torch.float32), copy=True)

    @property
    def fitness_history(self) -> list[float]:
        """The mean fitness of every generation up to now: the list that callbacks get."""
        return list(self.history.get("mean_fitness", []))

    def register_state(self, name: str, value: Any, *, persistent: bool = True) -> None:
        """Set an attribute that belongs to the state of the run, as ``register_buffer`` does for a module.

        :meth:`state_dict` and :meth:`save` include it, :meth:`load` restores it, and :meth:`reset` sets it back to
        ``value``. It also reaches the processes of an engine. If a generation fails, it is rolled back. Read it as
        ``self.name``. In ``compute_update``, assign to it or change it in place.

        Args:
            name: Name of the attribute.
            value: Its first value: a tensor, a number, a string, None, or a list, tuple or dictionary of these.
            persistent: Whether it is saved. Values that are recomputed in every generation need not be.

        Raises:
            RuntimeError: ``super().__init__()`` has not been called yet.
            TypeError: A checkpoint cannot hold the value.
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
            raise RuntimeError("register_state() before super().__init__(): call super().__init__() first")
        self._extra.register(self, name, value, persistent=persistent)

    def _record_initial_state(self) -> None:
        """Record the state that :meth:`reset` restores."""
        self._initial_options = self._options()
        # These and the best member's are kept as the model stores them: half the memory for a model in bf16.
        self._initial, self._initial_untrained = self._centre.stored(), self._learnt()
        self._initially_held = list(self._centre.parameters)
        self._best: Tensor | None = None
        self._best_untrained: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Restore the initial parameters and options, and clear the history and the optimizer's state."""
        with delayed_interrupt():
            for group, options in zip(self.param_groups, self._initial_options, strict=True):
                for key in group.keys() - {"params", "names"}:
                    del group[key]
                group.update(options)
            self._centre.assign(self._initial)
            self.set_frozen([name for name in self._centre.candidates if name not in self._initially_held])
            self._select_parameters(self._initially_held)
            self._follow_frozen()
            self._set_learnt(self._initial_untrained)
            self._centre.restart()
            self._schedules = Schedules(cast(torch.optim.Optimizer, self), *self._schedulers)
            self._warn_of_unregistered()
            self._extra.restore(self, self._extra.initial)
            self._forget()

    def _check_user_code(self) -> None:
        """Look for mistakes in the user's own code, at the start of a generation."""
        self._watch.stopwatch.restart()
        self._extra.note(self)
        plateau = self._plateau.warning(self)
        if plateau is not None:
            self._warn_once(plateau, "plateau")

    def _warn_of_unregistered(self) -> None:
        """Warn about tensors that a subclass has changed but not registered."""
        # The library's own trainers don't use attributes that were set from outside.
        of_library = type(self).__module__.startswith("eggroll_trainer.")
        changed = [] if of_library else self._extra.unregistered_changes(self)
        if changed:
            self._warn_once(unregistered_warning(type(self).__name__, changed), "lost")

    def _warn_once(
        self, message: str, kind: str | None = None, category: type[RuntimeWarning] = RuntimeWarning
    ) -> None:
        """Warn once, in the first process only."""
        if self.is_main:
            self._warned.once(message, kind, category)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that a bit-exact resume needs: tensors, numbers and strings."""
        self._warn_of_unregistered()
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
        """Restore the :meth:`state_dict` of a trainer of the same model that was made with the same arguments.

        Raises:
            ValueError: The state is of another model, of another kind of trainer, or not of a trainer. The trainer is
                then unchanged.
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
                f"the checkpoint has no {', '.join(sorted(missing))}, which was not registered when it was written:"
                " the current value is kept",
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
            path: File to write, as PNG, SVG or PDF. If None, the figure is only returned.
            style: ``"light"``, ``"dark"`` for dark pages, or ``"print"`` without colours.
            title: Title of the figure.

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
        """Write a checkpoint atomically: ``path`` holds either the old file or the complete new one.

        With several processes, the first one writes.
        """
        if self.is_main:
            write_checkpoint(self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Restore a checkpoint. Training then goes on exactly as if the run had not been stopped.

        Loading runs no code from the file. With several processes, call it in all of them; the first one reads.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, is not a checkpoint, or belongs to another model. The trainer is then
                unchanged.
        """
        self.load_state_dict(self.engine.from_main(lambda: read_checkpoint(path)))

    # Compared between processes that share a generation.

    def fingerprint(self) -> dict[str, Any]:
        """Return, by name, what must be the same in all processes of the current generation."""
        settings = self.settings()
        # As text, since comparing tensors among the options gives more than one bool.
        return {"generation": self.generation, **settings.plain(), "options": repr(settings.options)}

    def checksum(self) -> int:
        """Return a checksum over every bit of the parameters."""
        total = 0
        for name, value in self._centre.state_dict()["parameters"].items():
            bits = value.flatten().view(torch.int64 if value.itemsize == 8 else torch.int32).long()
            # Each position has its own odd factor. Integer sums wrap around, so their order does not matter.
            places = 2 * torch.arange(len(bits), device=bits.device) + 1
            total = (31 * total + len(name) + int((bits * places).sum())) % 2**64
        return total

    # Sent to copies of the trainer in other processes, every generation.

    def working_state(self) -> dict[str, Any]:
        """Return the part of the state that changes between generations and that evaluations depend on."""
        return {
            "generation": self.generation,
            "settings": self.settings().plain(),
            "learner": learner_state(self._learner),
            "alone": self._findings.alone,
            "extra": self._extra.sent(self),
            "trained": {name: _to_numpy(value.detach()) for name, value in self._centre.parameters.items()},
            "untrained": {
                name: _to_numpy(value.detach())
                for name, value in untrained(self.model, self._centre.parameters, persistent=False).items()
            },
        }

    @torch.no_grad()
    def set_working_state(self, state: dict[str, Any]) -> None:
        """Set the :meth:`working_state` of the original trainer in this copy, to evaluate chunks for it."""
        self.generation = state["generation"]
        compiled = self.settings().compile
        # A copy does not shape scores, and need not have the shaping function.
        adopt(self, {name: value for name, value in state["settings"].items() if name != "shaping"})
        if self.settings().compile != compiled:
            self._restart_forwards()
        self._select_parameters(state["trained"])
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        arrays = {**state["trained"], **state["untrained"]}
        # Includes buffers that a forward has created since, such as caches.
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
        """Return the attributes for a pickle or a deep copy, which makes new schedulers and a local engine."""
        left_out = ("step", "engine", "_forwards", "_method")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return {**state, "_schedules": plain_copy(self._schedules.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned."""
        self.__dict__.update(state)
        self.engine = LocalEngine()
        self._restart_forwards()
        self._schedules = Schedules(cast(torch.optim.Optimizer, self), *self._schedulers)
        self._schedules.load_state_dict(state["_schedules"])
        self._method = self._make_method()

    def _options(self) -> list[dict[str, Any]]:
        """Return the current options of the parameter groups."""
        return [{k: v for k, v in group.items() if k not in ("params", "names")} for group in self.param_groups]

    # Which parameters are trained.

    def set_frozen(self, names: Collection[str]) -> None:
        """Freeze the parameters of these names, and unfreeze all others that the trainer was given."""
        set_frozen(self._centre.candidates, names)

    def _follow_frozen(self) -> None:
        """Find out which parameters and rows the next generation trains."""
        trained = tuple(name for name, p in self._centre.candidates.items() if p.requires_grad)
        self._select_parameters({*self._centre.parameters, *trained})
        self._trained = trained
        rows = padding_rows(self.model)
        self._centre.fixed_rows = {name: rows[id(p)] for name, p in self._centre.candidates.items() if id(p) in rows}

    def _select_parameters(self, names: Collection[str]) -> None:
        """Make these the parameters of the centre, and of all saved flat parameters."""
        centre = self._centre
        if centre.parameters.keys() == set(names):
            return
        initial = centre.unflatten(self._initial)
        best = None if self._best is None else centre.unflatten(self._best)
        centre.select(names)
        # Parameters that were frozen until now have their initial value, in every member.
        current = centre.unflatten(centre.stored())
        self._initial = centre.flatten({**current, **initial})
        self._best = None if best is None else centre.flatten({**current, **best})

    def _untrained(self) -> dict[str, Tensor]:
        return untrained(self.model, self._centre.parameters)

    def settings(self) -> Settings:
        """Return the settings that the results of the next generation depend on."""
        return Settings(**self._settings())

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the fields of :class:`Settings`."""

    def _changed_settings(self, state: dict[str, Any]) -> list[str]:
        """Describe the settings that a state does not restore, and that differ from those it was saved with.

        Raises:
            ValueError: The state is of another kind of trainer.
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
        self._retest = Retest.from_state(state.get("retest"))
        self._asked, self._told = None, ToldScores.from_state(state.get("told"))
        self._extra.restore(self, state.get("extra", {}), state.get("initial_extra"))
        self._watch = Watch(state.get("last_step"))
        self.history, self.last_generation = plain_copy(state["history"]), None
        self.best_fitness = state["best_fitness"]
        self._best = None if state["best_params"] is None else state["best_params"].to(self.device, copy=True)
        self._follow_frozen()
        self._method.restart()

    def _forget(self) -> None:
        """Clear everything that past generations have left behind."""
        self.generation, self.last_generation = 0, None
        self.history = {key: [] for key in METRICS}
        self.best_fitness = float("-inf" if self.maximize else "inf")
        self._retest, self._plateau = Retest(), PlateauWatch()
        self._best, self._best_untrained = None, {}
        self._findings, self._watch = Findings(), Watch()
        self._asked = self._told = None
        self._method.restart()

    def _learnt(self) -> dict[str, Tensor]:
        """Return copies of the buffers and untrained parameters if a learner may change them, else nothing."""
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
        """Discard everything that is cached about the model's forwards."""


def _to_numpy(value: Tensor) -> Any:
    # NumPy has no bfloat16, so we pass its bits.
    value = value.cpu()
    return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _from_numpy(array: Any, dtype: torch.dtype) -> Tensor:
    # torch warns about read-only arrays, such as those in shared memory.
    value = torch.from_numpy(array.copy())
    return value.view(torch.bfloat16) if dtype == torch.bfloat16 else value
