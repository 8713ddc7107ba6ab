"""ESTrainer: the generation loop, the history, and the face of a ``torch.optim.Optimizer``."""

from __future__ import annotations

import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .._torch import uncompiled
from .._utils import validation
from .._utils.interrupts import delayed_interrupt, exit_on_sigterm, interruptible
from .._utils.memory import Budget
from .._utils.thread_state import restored_thread_state
from .._utils.warned import Warned
from ..callbacks import Checkpoints, Progress
from ..checkpoints.generation import Generation, adopt, adopted, differences, to_send
from ..distributed import Chunk, Engine, Outcome, local_device, make_engine
from ..fitness import thread_modes
from ..fitness.evaluate import Coalesce, is_batched
from ..fitness.learning import learner, merged
from ..fitness.scores import check_scores, mean_over_tasks, metrics_of, to_score, to_scores
from ..perturbation.sample import wide_dtype
from ..population import Population, WholePopulation
from ..population.forward import Forwards
from ..update.centre import Centre
from ..update.optimizers import OptimizerFactory
from ..update.schedule import LRSchedulerFactory, Schedules
from .best import copy_with, holding
from .evaluator import Evaluator
from .method import Method, Sampled
from .optimizer_face import OptimizerFace
from .run_state import RunState
from .told import Told


class ESTrainer(RunState, OptimizerFace, torch.optim.Optimizer, ABC):
    """Base class of evolution-strategy trainers.

    One generation evaluates ``N = population_size`` perturbed copies of the model and moves its parameters ``θ``, in
    place, to ``θ + learning_rate·Δθ``. A subclass says how members are perturbed and how ``Δθ`` follows from their
    fitness, with two methods over flat tensors. Everything else, among it running a plain fitness function for the
    whole population at once, is inherited.

    Args:
        params: Parameters to train, as ``torch.optim`` takes them: an iterable such as ``model.parameters()``, or
            groups with their own ``lr`` and ``sigma``. All of the model's if None; those left out stay frozen. One
            with ``requires_grad=False`` is neither perturbed nor updated, until it is freed; what is set between two
            generations holds from the next one on.
        model: The module to train.
        fitness_fn: From a module to its fitness, higher is better: a float, a 0-d tensor or a NumPy scalar; or a tensor
            or array ``[K]``, ``K ≥ 2``, with a score for each of several tasks, such as prompts or episodes. If marked
            with :func:`eggroll_trainer.batched`, from a :class:`~eggroll_trainer.Population` to ``[N]`` or ``[N, K]``.
        population_size: ``N``, how many models are evaluated in a generation.
        learning_rate: Step size; ``param_groups[i]["lr"]``.
        sigma: Standard deviation of the perturbations; ``param_groups[i]["sigma"]``.
        device: Where to train; the model is moved there. Where the model is, if None.
        seed: Seed of the run. Drawn from the system, and readable as ``trainer.seed``, if None.
        optimizer: What takes the step: a ``torch.optim`` class or another factory ``(params, lr=…)`` of a
            ``torch.optim.Optimizer``. It gets ``-Δθ`` as gradient. ``torch.optim.SGD`` if None.
        lr_scheduler: Factory of a ``torch.optim.lr_scheduler`` from the trainer, stepped after every generation. One
            that you make and step yourself works as well. ``ReduceLROnPlateau`` gets the mean fitness: make it with
            ``mode="max"``, and ``threshold_mode="abs"`` where fitness is negative.
        sigma_scheduler: Factory of a ``torch.optim.lr_scheduler`` that drives ``sigma`` instead.
        chunk_size: How many members are evaluated at a time; bounds memory, and is what an engine shares out. If None,
            as many as fit in ``memory_budget``, up to 1024 on a CPU; where an accelerator runs out of memory, half as
            many from then on.
        coalesce: Whether a plain ``fitness_fn`` is run for the members of a chunk together. If True, that is checked
            now and then: some members are evaluated alone as well, on the model that you passed, and if anything
            differs, all members run alone from then on, with a warning. ``"unchecked"`` goes without; with False they
            run alone.
        compile: Whether to run the model's batched forwards with ``torch.compile``. What cannot be compiled runs as it
            would without, and one warning says why.
        memory_budget: Bytes that an evaluation may take besides the model; a share of the device's memory if None. A
            forward for many members is cut up so that its own tensors fit, whatever ``chunk_size`` is.
        evaluation_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the fitness function under ``torch.autocast``
            to that type. Weights, noise and update stay as they are.
        engine: Who evaluates the chunks of a population: ``"local"`` for this process, ``"torch"`` for the processes
            of ``torch.distributed``, ``"ray"`` for a Ray cluster, or an :class:`~eggroll_trainer.distributed.Engine`.
            If None, ``"torch"`` in a script that ``torchrun`` started in several processes, else ``"local"``. The
            numbers are the same.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or there is nothing to train.

    Example:
        >>> class Simple(ESTrainer):
        ...     def sample_perturbations(self, population_size):
        ...         return torch.randn(population_size, len(self.current_params)) * self.sigma
        ...
        ...     def compute_update(self, perturbations, fitnesses):
        ...         weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        ...         return (weights[:, None] * perturbations).mean(dim=0)
        >>> model = nn.Linear(3, 1)
        >>> x = torch.randn(8, 3)
        >>> trainer = Simple(model.parameters(), model, lambda model: -model(x).square().mean(), seed=0)
        >>> trainer.train(2, verbose=False)["generation"]
        2
    """

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        model: nn.Module | None = None,
        fitness_fn: Callable[..., Any] | None = None,
        population_size: int = 50,
        learning_rate: float = 0.01,
        sigma: float = 0.1,
        device: torch.device | str | None = None,
        seed: int | None = None,
        *,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        sigma_scheduler: LRSchedulerFactory | None = None,
        chunk_size: int | None = None,
        coalesce: Coalesce = True,
        compile: bool = False,
        memory_budget: int | None = None,
        evaluation_dtype: torch.dtype | None = None,
        engine: str | Engine | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(fitness_fn):
            raise TypeError(f"fitness_fn must be callable, got {type(fitness_fn).__name__}")
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                "optimizer must be a factory such as torch.optim.Adam or a functools.partial of it,"
                f" got a {type(optimizer).__name__}"
            )
        # The user's parameter names are those of the module inside.
        model = uncompiled(model)
        self.model: nn.Module = model
        self.fitness_fn = fitness_fn
        self.population_size, self.chunk_size = population_size, chunk_size
        self._check_sizes()
        self.coalesce, self.compile = validation.check_coalesce(coalesce), bool(compile)
        self.evaluation_dtype = validation.check_evaluation_dtype(evaluation_dtype)
        if memory_budget is not None:
            memory_budget = validation.check_int("memory_budget", memory_budget, 1)
        self.engine = make_engine(engine)
        self._seed = (
            self.engine.from_main(lambda: secrets.randbits(63))
            if seed is None
            else validation.check_int("seed", seed, -(2**63))
        )
        defaults = {
            "lr": validation.check_real("learning_rate", learning_rate, positive=False),
            "sigma": validation.check_real("sigma", sigma, positive=True),
            **self._group_defaults(),
        }
        groups = validation.parameter_groups(params, model)
        for group in groups:
            validation.check_options(group, defaults)
            group["lr"] = validation.check_real("learning_rate", group.get("lr", learning_rate), positive=False)
            group["sigma"] = validation.check_real("sigma", group.get("sigma", sigma), positive=True)
        if device is not None:
            model.to(local_device(validation.check_device(device)))
            # Between some kinds of devices a parameter does not move: another one takes its place.
            moved = dict(model.named_parameters(remove_duplicate=False))
            for group in groups:
                group["params"] = [moved[name] for name in group["names"]]
        # Scripts that don't seed torch make another model in every process.
        self.engine.copy_main([*model.parameters(), *model.buffers()])
        self.device = next(p.device for group in groups for p in group["params"] if p.requires_grad)
        super().__init__(groups, defaults)
        self._constructed = True

        self._initial_options = [
            {k: v for k, v in g.items() if k not in ("params", "names")} for g in self.param_groups
        ]
        self._centre = Centre(self.param_groups, torch.optim.SGD if optimizer is None else optimizer)
        self._schedulers = (lr_scheduler, sigma_scheduler)
        self._schedules = Schedules(self, *self._schedulers)
        self._initial, self._best = self._centre.flat(), None
        self._initially_held = list(self._centre.parameters)
        self._follow_frozen()
        self._warned = Warned()
        self._budget = Budget(memory_budget)
        self._restart_forwards()
        self._method = self._make_method()
        self._evaluator = Evaluator(self)
        self.generation = 0
        self.best_fitness = float("-inf")
        self._in_best_weights = 0
        self._learner = learner(fitness_fn)
        self._initial_untrained = self._learnt()
        self._best_untrained: dict[str, Tensor] = {}
        self.history: dict[str, list[Any]] = {}
        self._forget()

    # What a subclass writes.

    @abstractmethod
    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return a perturbation for every member, scaled by sigma.

        torch's global generators are seeded from ``seed`` and the generation meanwhile.

        Args:
            population_size: ``N``.

        Returns:
            ``[N, D]``.
        """

    @abstractmethod
    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Return the update: the parameters become ``θ + learning_rate·update``.

        Args:
            perturbations: ``[N, D]``, as they were sampled.
            fitnesses: ``[N]`` in float64, finite, higher is better; means over tasks where members have several scores.
                Products with tensors of another dtype are taken in the wider one.

        Returns:
            ``[D]``.
        """

    # The face of an optimizer.

    @property
    def seed(self) -> int:
        """Seed of the run; a new one holds from the next generation on."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = validation.check_int("seed", value, -(2**63))
        self._method.restart()

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """What ``lr_scheduler=`` made."""
        return self._schedules.lr_scheduler

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

    def __repr__(self) -> str:
        """Return the class, the model's and the number of weights, and where the run stands."""
        return (
            f"{type(self).__name__}({type(self.model).__name__} with {len(self._centre)} weights,"
            f" population_size={self.population_size}, learning_rate={self.learning_rate:g}, sigma={self.sigma:g},"
            f" seed={self.seed}, generation={self.generation})"
        )

    # One generation, and many.

    def step(self, closure: Callable[..., Any] | None = None) -> dict[str, Any]:  # type: ignore[override]
        """Run one generation.

        If anything raises, the parameters and the history stay those of the last whole generation, and training can
        go on.

        Args:
            closure: Ignored; the fitness function is given at construction.

        Returns:
            Metrics: ``generation`` (counted from 1), ``fitness`` (of the generation's best member),
            ``mean_fitness``, ``std_fitness``, ``best_fitness`` (so far), ``update_norm`` (length of the step),
            ``num_nonfinite`` (scores that were NaN or inf and counted as the worst finite one), ``num_tied`` (members
            who share their fitness), ``learning_rate`` and ``sigma``. A member's fitness is its mean over the tasks,
            where it has a score for each of several.

        Raises:
            ValueError: No member has a finite fitness.
            TypeError: The fitness function does not return a number.
        """
        self._start_generation()
        self._asked = self._told = None
        # The fitness function runs under the caller's modes.
        with interruptible(), restored_thread_state(), thread_modes.kept():
            scores, statistics = self._evaluator.evaluate_all()
        return self._advance(scores, statistics)

    def ask(self) -> WholePopulation:
        """Begin a generation and return its members, for evaluation elsewhere; :meth:`tell` makes the step.

        Asked again before it is told, it returns the same members; it does so after :meth:`save` and :meth:`load` too.
        :meth:`step` evaluates the same members by the trainer's own fitness function.

        Returns:
            The population of ``N`` members: ``chunks()``, ``member(i)`` (a dense copy), ``lora(i)`` (as an adapter),
            ``population(x)``, ``each(xs)``. It is of use until the generation is told.

        Example:
            >>> from eggroll_trainer import EGGROLLTrainer
            >>> x = torch.randn(8, 3)
            >>> trainer = EGGROLLTrainer(
            ...     model=nn.Linear(3, 1), fitness_fn=lambda model: 0.0, population_size=16, seed=0
            ... )
            >>> population = trainer.ask()
            >>> trainer.tell(-population(x).square().mean((1, 2)))["generation"]
            1
        """
        self._start_generation()
        self._asked = _of_members(self.settings().plain())
        if self._told is not None and self._told.settings != self._asked:
            # Scores of other members.
            self._told = None
        number = self.generation

        def make(first: int, count: int) -> Population:
            if self.generation != number or self._asked is None:
                raise RuntimeError(f"generation {number + 1} is over, and its members are gone; ask() again")
            return self._evaluator.population(first, count)

        return WholePopulation(self.model, make, self._evaluator.chunks(), self._method.unit)

    def tell(self, scores: Any, members: Sequence[int] | None = None) -> dict[str, Any] | None:
        """Give the members that were asked for their fitness, and make the step once all have theirs.

        Of several processes all must be told the same.

        Args:
            scores: ``[N]``, or ``[N, K]`` with a column for each of ``K`` tasks; higher is better. NaN for what failed,
                which counts as the worst of its task. With ``members``, one or a row for each of them.
            members: Indices of the members that the scores are of, in any order; all if None. What was told of others
                is kept, also by :meth:`save`.

        Returns:
            What :meth:`step` returns, or None while members are missing.

        Raises:
            RuntimeError: The generation was not asked for.
            ValueError: A score or member too many, scores of different numbers of tasks, or settings that members
                depend on have changed since :meth:`ask`.
        """
        if self._asked is None:
            raise RuntimeError("tell() without ask(): ask for the members of the generation first")
        changed = differences(_of_members(self.settings().plain()), self._asked)
        if changed:
            raise ValueError(f"{', '.join(changed.values())} since ask(): the scores are of other members; ask() again")
        told = Told(self.population_size, self._asked) if self._told is None else self._told
        told = told.with_scores(scores, members)
        if not told.complete:
            self._told = told
            return None
        # What torch notes when ``step`` is called, and its schedulers look for.
        self._opt_called = True
        return self._advance(told.scores, [])

    def repeat(self, generation: Generation) -> dict[str, Any]:
        """Make the step of a generation that was logged, without evaluating its members; returns what it returned.

        The trainer's settings become those of that generation. If anything raises, nothing has changed.

        Args:
            generation: The one after the last that the trainer has made, or repeated.

        Raises:
            ValueError: It is another one, or was shaped by another function of the user's.
        """
        if generation.number != self.generation + 1:
            raise ValueError(f"the next generation is {self.generation + 1}, got {generation.number}")
        with adopted(self, generation.settings):
            self._start_generation()
            # What torch notes when ``step`` is called, and its schedulers look for.
            self._opt_called = True
            return self._advance(generation.scores, generation.statistics)

    def train(
        self,
        num_generations: int,
        verbose: bool = True,
        log_every: int = 1,
        callback: Callable[[int, list[float]], Any] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> dict[str, Any]:
        """Run generations, going on from where the trainer is.

        Args:
            num_generations: How many.
            verbose: Whether to show a progress bar with the mean and best fitness.
            log_every: Call ``callback`` every so many generations; it is called after the last in any case.
            callback: Called with the generation, counted from 1, and the list of mean fitnesses up to it. Of several
                processes the first one calls it, and what it does to the trainer's arguments and parameter groups, and
                to ``requires_grad`` of the parameters, reaches all.
            checkpoints: Where to keep the run: every so many generations, and in the end, whatever ends it, a Ctrl-C or
                an exception too. A SIGTERM, as schedulers send it, then abandons the generation under way and leaves
                the script by ``SystemExit(143)``.

        Returns:
            The metrics of the last generation, and ``fitness_history``, the list of mean fitnesses.

        Raises:
            TypeError: An argument is not an integer.
            ValueError: ``num_generations`` is negative or ``log_every`` less than 1.
            FileExistsError: The folder of ``checkpoints`` holds a run that the trainer does not go on with.
        """
        num_generations = validation.check_int("num_generations", num_generations, 0)
        log_every = validation.check_int("log_every", log_every, 1)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(num_generations, verbose and self.is_main))
            if checkpoints is not None:
                self.engine.from_main(lambda: checkpoints.begin(self))
                stack.enter_context(exit_on_sigterm())
                stack.callback(checkpoints.save, self)
            for i in range(num_generations):
                progress.update(self.step())
                if checkpoints is not None:
                    checkpoints.after_generation(self)
                if callback is not None and (self.generation % log_every == 0 or i == num_generations - 1):
                    self._call(callback)
        last = {key: values[-1] for key, values in self.history.items() if values}
        return {
            "generation": self.generation,
            "best_fitness": self.best_fitness,
            **last,
            "fitness_history": self.fitness_history,
        }

    def evaluate_fitness(self, model: nn.Module) -> float:
        """Return the fitness of one model, such as ``trainer.model`` or ``trainer.get_best_model()``.

        Where it has a score for each of several tasks, this is their mean. A subclass may override it; members are then
        scored by the subclass's.

        Raises:
            TypeError: The fitness function does not return a number.
            ValueError: It returns an array of the wrong shape.
        """
        if not is_batched(self.fitness_fn):
            return float(mean_over_tasks(to_score(self.fitness_fn(model))))
        return float(mean_over_tasks(to_scores(self.fitness_fn(Population.of(model)), 1)[0]))

    def get_best_model(self) -> nn.Module:
        """Return a new module with the weights of the best member seen so far, the ones that earned its score.

        Before the first generation these are the model's own.

        Raises:
            RuntimeError: A deep copy of the model does not compute what the model itself does; see
                :meth:`best_weights`.
        """
        return copy_with(self.model, self._best_values(), self._findings.sample)

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[nn.Module]:
        """Put the weights of the best member seen so far into the model itself, inside the block.

        Unlike the copy that :meth:`get_best_model` returns, it is the model that you know: closures over it, hooks and
        lists of its modules are right as well. Don't take a step inside the block.

        Yields:
            ``trainer.model``.

        Example:
            >>> from eggroll_trainer import EGGROLLTrainer
            >>> model = nn.Linear(3, 1)
            >>> x = torch.ones(8, 3)
            >>> trainer = EGGROLLTrainer(model=model, fitness_fn=lambda m: m(x).mean(), seed=0)
            >>> _ = trainer.step()
            >>> with trainer.best_weights() as best:
            ...     round(best(x).mean().item() - trainer.best_fitness, 5)
            0.0
        """
        self._in_best_weights += 1
        try:
            with holding(self.model, self._best_values()):
                yield self.model
        finally:
            self._in_best_weights -= 1

    def _best_values(self) -> dict[str, Tensor]:
        """Return parameters, buffers and untrained parameters of the best member, by their names."""
        if self._best is None:
            return {}
        trained = self._centre.parameters
        kept = {name: value for name, value in self._best_untrained.items() if name not in trained}
        return {**self._centre.unflatten(self._best), **kept}

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
            self._schedules = Schedules(self, *self._schedulers)
            self._forget()

    def _settings(self) -> dict[str, Any]:
        return {
            "trainer": type(self).__name__,
            "optimizer": type(self._centre.optimizer).__name__,
            "optimizer_options": self._centre.optimizer_options(),
            "lr_scheduler": type(self._schedules.lr_scheduler).__name__,
            "sigma_scheduler": type(self._schedules.sigma_scheduler).__name__,
            "population_size": self.population_size,
            "chunk_size": min(self.population_size, self._evaluator.chunk_members()),
            "coalesce": self.coalesce,
            "compile": self.compile,
            "evaluation_dtype": str(self.evaluation_dtype),
            "device": self.device.type,
            "dtypes": sorted({str(p.dtype) for p in self._centre.candidates.values()}),
            "seed": self._seed,
            "options": self._options(),
            "frozen": [name for name, p in self._centre.candidates.items() if not p.requires_grad],
        }

    def _check_sizes(self) -> None:
        """Check the attributes that say how large a population is, which may change at any time."""
        self.population_size = validation.check_int("population_size", self.population_size, 1)
        if self.chunk_size is not None:
            self.chunk_size = validation.check_int("chunk_size", self.chunk_size, 1)

    def _check_live(self) -> None:
        """Check what may have changed since the last generation."""
        self._check_sizes()
        self._forwards.compile = self.compile
        self._follow_frozen()
        if not any(self._centre.parameters[name].numel() for name in self._trained):
            raise ValueError(
                "every parameter is frozen (requires_grad=False), so there is nothing to train; free some with"
                " requires_grad_(True)"
            )
        for group in self.param_groups:
            validation.check_real("learning_rate", group["lr"], positive=False)
            validation.check_real("sigma", group["sigma"], positive=True)
        self._centre.check_model(self.model)

    # The stations of a generation.

    def _group_defaults(self) -> dict[str, Any]:
        """Return further options of parameter groups with their defaults."""
        return {}

    def _make_method(self) -> Method:
        """Return how members are perturbed, and how the update follows from their fitness."""
        return Sampled(self)

    def _restart_forwards(self) -> None:
        self._forwards = Forwards(compile=self.compile, budget=self._budget)

    def evaluate_chunk(self, chunk: Chunk) -> Outcome:
        """Evaluate some members of the current generation in this process: for engines."""
        return self._evaluator.evaluate_chunk(chunk)

    def _start_generation(self) -> None:
        with delayed_interrupt(), thread_modes.neutral():
            if self._in_best_weights:
                raise RuntimeError("step() inside best_weights(): leave the block first")
            self._check_live()
            self._findings.begin_generation(self.generation, self._fitness_fn(), self.model)
            self._method.begin_generation()

    def _advance(self, scores: Tensor, statistics: list[Tensor]) -> dict[str, Any]:
        """End the generation with the members' scores, and return its metrics.

        If anything raises, nothing has changed.
        """
        settings = self.settings()
        last = Generation(self.generation + 1, settings.plain(), scores, statistics)
        checked = check_scores(scores, self.generation + 1, settings.group_size)
        if checked.num_nonfinite:
            whose = "group" if settings.group_size else "generation"
            if scores.ndim > 1:
                whose += " and task, and a task without any is left out"
            self._warn_once(
                f"a fitness that is not finite counts as the worst finite one of its {whose}; see num_nonfinite in the"
                " metrics",
            )
        with delayed_interrupt(), thread_modes.neutral():
            improved = (
                self._member_parameters(checked.best)
                if float(checked.means[checked.best]) > self.best_fitness
                else None
            )
            gradient = self._method.gradient(checked)
            learning_rates = [group["lr"] for group in self.param_groups]
            metrics = metrics_of(checked, self.generation + 1, self.best_fitness, self.learning_rate, self.sigma)
            learnt = None if improved is None else self._learnt()
            appends = [self.history.setdefault(key, []).append for key in metrics]
            # Whatever raises in here, each of these goes back.
            with (
                self._schedules.stepped(metrics["mean_fitness"]),
                self._centre.stepped(gradient, learning_rates) as metrics["update_norm"],
                merged(self._learner if statistics else None, self.model, statistics, self._centre.parameters),
            ):
                pass
            if improved is not None and learnt is not None:
                self._best, self.best_fitness, self._best_untrained = improved, metrics["best_fitness"], learnt
            self.generation, self.last_generation = last.number, last
            self._asked = self._told = None
            for append, value in zip(appends, metrics.values(), strict=True):
                append(value)
        return metrics

    def _call(self, callback: Callable[[int, list[float]], Any]) -> None:
        """Call a user's function in the first process, and follow what it did to the trainer in all."""
        if self.engine.size == 1:
            callback(self.generation, self.fitness_history)
            return

        def call() -> dict[str, Any]:
            before = self.settings()
            callback(self.generation, self.fitness_history)
            return to_send(self, before)

        settings = self.engine.from_main(call)
        if not self.is_main:
            adopt(self, settings)

    def _fitness_fn(self) -> Callable[..., Any]:
        """Return the fitness function, or the method of a subclass in its place."""
        overridden = type(self).evaluate_fitness is not ESTrainer.evaluate_fitness
        return self.evaluate_fitness if overridden else self.fitness_fn

    def _member_parameters(self, index: int) -> Tensor:
        """Return all parameters of one member of the current generation, ``[D]``."""
        unit = self._method.unit
        first = index // unit * unit
        # As the population forms them, to the last bit: for bf16 models that is not what the master weights give.
        population = Population(self.model, self._method.perturbations(first, unit), first=first)
        member = population.member_parameters(index - first)
        # What is frozen is in every member what it is in the centre.
        values = {**{name: p.detach() for name, p in self._centre.parameters.items()}, **member}
        return self._centre.flatten({name: value.to(wide_dtype(value)) for name, value in values.items()})


def _of_members(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a record the members of a generation depend on."""
    kept = {key: settings[key] for key in ("population_size", "seed", "frozen", "noise_reuse", "noise")}
    options = [{key: value for key, value in group.items() if key != "lr"} for group in settings["options"]]
    return {**kept, "options": options}
