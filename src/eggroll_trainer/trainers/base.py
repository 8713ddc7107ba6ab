"""ESTrainer: the base class of trainers, a ``torch.optim.Optimizer`` whose ``step`` is one generation."""

from __future__ import annotations

import functools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import uncompiled
from .._utils import validation
from .._utils.arguments import TRAIN_ALIASES, TRAINER_ALIASES, explain_unknown
from .._utils.interrupts import delayed_interrupt, interruptible
from .._utils.memory import Budget
from .._utils.thread_state import restored_thread_state
from .._utils.warned import Warned
from ..callbacks import Callbacks, Checkpoints
from ..checkpoints.generation import Generation, adopted, differences
from ..diagnostics import Watch
from ..diagnostics.agreement import sample
from ..distributed import Chunk, Engine, Outcome, make_engine
from ..fitness import thread_modes
from ..fitness.evaluate import Coalesce, is_batched
from ..fitness.learning import learner, merged
from ..fitness.scores import (
    CheckedScores,
    check_scores,
    mean_over_tasks,
    metrics_of,
    nonfinite_warning,
    to_score,
    to_scores,
)
from ..population import Population, WholePopulation
from ..population.forward import Forwards
from ..update.centre import Centre
from ..update.optimizers import OptimizerFactory
from ..update.schedule import LRSchedulerFactory, Schedules
from .best_member import BestMember
from .course import course_of
from .evaluator import Evaluator
from .extra_state import ExtraState
from .loop import run
from .method import Method, Sampled
from .optimizer_interface import OptimizerInterface
from .retest import best_of, earned_again
from .run_state import RunState
from .settings import settings_of, settings_of_members
from .told import ToldScores
from .trainable import parameter_groups


class ESTrainer(RunState, BestMember, OptimizerInterface, torch.optim.Optimizer, ABC):
    """Base class of evolution-strategy trainers.

    One generation evaluates ``N = population_size`` perturbed copies of the model and moves its parameters ``θ``, in
    place, to ``θ + learning_rate·Δθ``. A subclass defines how members are perturbed and how ``Δθ`` follows from their
    fitness, in two methods over flat tensors. Everything else is inherited, including the evaluation of a plain fitness
    function for the whole population at once.

    Args:
        params: Parameters to train, as ``torch.optim`` takes them: an iterable such as ``model.parameters()``, or
            groups with their own ``lr`` and ``sigma``. All parameters of the model if None. Parameters that are left
            out, or have ``requires_grad=False``, are neither perturbed nor updated. You may change ``requires_grad``
            between generations.
        model: The module to train.
        fitness_fn: Takes a module and returns its fitness, higher is better: a float, a 0-d tensor or a NumPy scalar;
            or a tensor or array ``[K]``, ``K ≥ 2``, with a score for each of several tasks, such as prompts or
            episodes. If it is marked with :func:`eggroll_trainer.batched`, it takes a
            :class:`~eggroll_trainer.Population` and returns ``[N]`` or ``[N, K]``.
        population_size: ``N``, the number of models evaluated in a generation.
        learning_rate: Step size; ``param_groups[i]["lr"]``.
        sigma: Standard deviation of the perturbations; ``param_groups[i]["sigma"]``.
        device: Device to train on; the model is moved there. If None, the model's own device.
        seed: Seed of the run. If None, it is drawn from the operating system; read it as ``trainer.seed``.
        optimizer: Optimizer that takes the step: a ``torch.optim`` class or another factory ``(params, lr=…)`` of a
            ``torch.optim.Optimizer``. It gets ``-Δθ`` as gradient. ``torch.optim.SGD`` if None.
        lr_scheduler: Factory of a ``torch.optim.lr_scheduler`` from the trainer, stepped after every generation. A
            scheduler that you make and step yourself works as well. ``ReduceLROnPlateau`` gets the mean fitness: make
            it with ``mode="max"``, and with ``threshold_mode="abs"`` if fitness is negative.
        sigma_scheduler: Factory of a ``torch.optim.lr_scheduler`` that drives ``sigma`` instead.
        anchor_decay: Pulls the weights back to the initial ones ``θ₀``, as weight decay pulls them to zero: before each
            step ``θ ← θ - learning_rate·anchor_decay·(θ - θ₀)``; ``param_groups[i]["anchor_decay"]``. Use it for
            fine-tuning that should stay close to ``θ₀``.
        chunk_size: Number of members evaluated at a time. It bounds memory, and chunks are what an engine distributes.
            If None, as many as fit in ``memory_budget``, up to 1024 on a CPU; halved if an accelerator runs out of it.
        coalesce: Whether to evaluate the members of a chunk together if ``fitness_fn`` is a plain function. If True,
            this is checked now and then: some members are also evaluated alone, on the model that you passed. If
            anything differs, you get a warning, and all members are evaluated alone from then on. ``"unchecked"``
            skips the checks. False evaluates every member alone.
        compile: Whether to run the model's batched forwards with ``torch.compile``. A model that cannot be compiled
            runs without it, and one warning says why.
        memory_budget: Bytes that an evaluation may use in addition to the model. If None, a share of the device's
            memory. A batched forward is split so that its intermediate tensors fit, whatever ``chunk_size`` is.
        evaluation_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the fitness function under ``torch.autocast``
            to that type. Weights, noise and update stay as they are.
        engine: What evaluates the chunks of a population: ``"local"`` for this process, ``"torch"`` for the processes
            of ``torch.distributed``, ``"ray"`` for a Ray cluster, or an :class:`~eggroll_trainer.distributed.Engine`.
            If None, ``"torch"`` in a script that ``torchrun`` started in several processes, else ``"local"``. Results
            do not depend on the engine.
        maximize: Whether higher fitness is better. Pass False for a loss: ``history``, ``best_fitness`` and what
            callbacks get are then losses too, and the lowest is the best. ``compute_update`` gets negative losses.

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

    @explain_unknown(TRAINER_ALIASES)
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
        anchor_decay: float = 0.0,
        chunk_size: int | None = None,
        coalesce: Coalesce = True,
        compile: bool = False,
        memory_budget: int | None = None,
        evaluation_dtype: torch.dtype | None = None,
        engine: str | Engine | None = None,
        maximize: bool = True,
    ) -> None:
        inherited = set(vars(self))
        # torch.compile prefixes parameter names; the user's names are those of the original module.
        self.model = model = uncompiled(validation.check_module(model, params))
        self.fitness_fn = fitness_fn = validation.check_fitness_fn(fitness_fn)
        optimizer = validation.check_optimizer(optimizer)
        self.population_size, self.chunk_size = population_size, chunk_size
        self._check_sizes()
        self._maximize = validation.check_bool("maximize", maximize)
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
            "anchor_decay": validation.check_real("anchor_decay", anchor_decay, positive=False),
            **self._group_defaults(),
        }
        groups = parameter_groups(params, model, defaults, device)
        # Without a seed, each process initialises its own model: all take the first process's.
        self.engine.copy_main([*model.parameters(), *model.buffers()])
        self.device = next(p.device for group in groups for p in group["params"] if p.requires_grad)
        super().__init__(groups, defaults)
        self._constructed = True

        self._centre = Centre(self.param_groups, optimizer)
        self._learner = learner(fitness_fn)
        self._record_initial_state()
        self._schedulers = (lr_scheduler, sigma_scheduler)
        self._schedules = Schedules(self, *self._schedulers)
        self._follow_frozen()
        self._warned, self._watch = Warned(), Watch()
        self._budget = Budget(memory_budget)
        self._restart_forwards()
        self._method = self._make_method()
        self._evaluator = Evaluator(self)
        self._forget()
        self._extra = ExtraState(vars(self).keys() - inherited)

    # The two methods that a subclass must implement.

    @abstractmethod
    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return a perturbation for every member, scaled by sigma.

        During the call, torch's global generators are seeded from ``seed`` and the generation.

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
            fitnesses: ``[N]`` in float64, finite, higher is better (losses are negated). If members have a score for
                each of several tasks, the means. Products with tensors of another dtype use the wider dtype.

        Returns:
            ``[D]``.
        """

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
            that share their fitness), ``learning_rate``, ``sigma``, and what :mod:`eggroll_trainer.diagnostics` adds.
            If members have a score for each of several tasks, their fitness is the mean of these.

        Raises:
            ValueError: No member has a finite fitness.
            TypeError: The fitness function does not return a number.
        """
        self._start_generation()
        self._asked = self._told = None
        # The fitness function runs under the caller's grad, inference and autocast modes.
        with interruptible(), restored_thread_state(), thread_modes.kept():
            scores, statistics = self._evaluator.evaluate_all()
        return self._advance(scores, statistics, functools.partial(earned_again, self), evaluated=True)

    def ask(self) -> WholePopulation:
        """Begin a generation and return its members, for evaluation elsewhere; :meth:`tell` makes the step.

        Until :meth:`tell` has completed the generation, further calls return the same members, also after :meth:`save`
        and :meth:`load`. :meth:`step` evaluates the same members with the trainer's own fitness function.

        Returns:
            The population of ``N`` members: ``chunks()``, ``member(i)`` (a dense copy), ``lora(i)`` (as an adapter),
            ``population(x)``, ``each(xs)``. It is valid until the generation ends.

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
        self._asked = settings_of_members(self.settings().plain())
        if self._told is not None and self._told.settings != self._asked:
            # The settings have changed since, so these are scores of other members.
            self._told = None
        return self._evaluator.whole_population()

    def tell(self, scores: Any, members: Sequence[int] | None = None) -> dict[str, Any] | None:
        """Report the fitness of members that :meth:`ask` returned; the step is made once all members have a score.

        With several processes, call it in each of them with the same scores.

        Args:
            scores: ``[N]``, or ``[N, K]`` with a column for each of ``K`` tasks; higher is better. NaN marks a failed
                evaluation, which counts as the worst of its task. With ``members``, one score or row for each of them.
            members: Indices of the members that the scores are of, in any order; all if None. Scores of other members
                from earlier calls are kept, also by :meth:`save`.

        Returns:
            What :meth:`step` returns, or None while members are missing.

        Raises:
            RuntimeError: :meth:`ask` was not called in this generation.
            ValueError: The numbers of scores and members differ, there is no such member, numbers of tasks differ, or
                settings that members depend on have changed since :meth:`ask`.
        """
        if self._asked is None:
            raise RuntimeError("tell() without ask(): call ask() first, and score the members that it returns")
        changed = differences(settings_of_members(self.settings().plain()), self._asked)
        if changed:
            raise ValueError(f"{', '.join(changed.values())} since ask(): the scores are of other members; ask() again")
        told = ToldScores(self.population_size, self._asked) if self._told is None else self._told
        told = told.with_scores(scores, members)
        if not told.complete:
            self._told = told
            return None
        # torch sets this when ``step`` is called; schedulers warn without it.
        self._opt_called = True
        return self._advance(told.scores, [])

    def _start_generation(self) -> None:
        with delayed_interrupt(), thread_modes.neutral():
            if self._held:
                raise RuntimeError("no step is possible while the model holds other weights: leave the block first")
            self._check_live()
            self._check_user_code()
            self._findings.begin_generation(self.generation, self._fitness_fn(), self.model)
            self._method.begin_generation()

    def _advance(
        self,
        scores: Tensor,
        statistics: list[Tensor],
        again: Callable[[CheckedScores], float | None] | None = None,
        evaluated: bool = False,
    ) -> dict[str, Any]:
        """End the generation with the members' scores, and return its metrics.

        If anything raises, nothing has changed. ``evaluated`` is True if the scores are those of the trainer's fitness
        function. ``again`` evaluates the best member again and returns its fitness, or None.
        """
        settings, sign = self.settings(), 1.0 if self.maximize else -1.0
        checked = check_scores(scores if self.maximize else -scores, self.generation + 1, settings.group_size)
        with interruptible(), restored_thread_state(), thread_modes.kept():
            earned = None if again is None else again(checked)
        last = Generation(self.generation + 1, settings.plain(), scores, statistics, earned)
        if checked.num_nonfinite:
            self._warn_once(nonfinite_warning(scores, settings.group_size))
        with delayed_interrupt(), thread_modes.neutral(), self._extra.kept(self), self._watch.timing("update"):
            best_fitness = best_of(self.best_fitness, sign * float(checked.means[checked.best]), earned, self.maximize)
            is_best = best_fitness != self.best_fitness
            improved = self._evaluator.member_weights(checked.best) if is_best else None
            estimate = self._method.estimate(checked)
            measured = self._watch.measure(estimate)
            learning_rates = [group["lr"] for group in self.param_groups]
            anchor = self._centre.unflatten(self._initial)
            metrics = metrics_of(checked, last.number, best_fitness, self.learning_rate, self.sigma, self.maximize)
            metrics |= measured.metrics | {"relative_update": 0.0}
            stepped = {name: self._centre.masters[name] for name in estimate.gradient}
            size, before = self._centre.length(), sample(stepped)
            learnt = None if improved is None else self._learnt()
            appends = [self.history.setdefault(key, []).append for key in metrics]
            # If anything raises in here, all three are rolled back.
            with (
                self._schedules.stepped(metrics["mean_fitness"]),
                self._centre.stepped(estimate.gradient, learning_rates, anchor) as metrics["update_norm"],
                merged(self._learner if statistics else None, self.model, statistics, self._centre.parameters),
            ):
                pass
            metrics["relative_update"] = metrics["update_norm"] / size if size else 0.0
            if improved is not None and learnt is not None:
                self._best, self.best_fitness, self._best_untrained = improved, best_fitness, learnt
            self._retest.note(last.number, earned, is_best)
            self.generation, self.last_generation = last.number, last
            self._asked = self._told = None
            self._watch.accept(measured, sample(stepped) - before)
            for append, value in zip(appends, metrics.values(), strict=True):
                append(value)
        self._adapt(metrics, checked)
        self._watch.look(lambda: course_of(self, checked.means, evaluated), self.generation, self._warn_once)
        return metrics

    def repeat(self, generation: Generation) -> dict[str, Any]:
        """Repeat the step of a logged generation without evaluating its members; return the same metrics.

        The trainer's settings become those of that generation. If anything raises, nothing has changed.

        Args:
            generation: The one after the trainer's last generation.

        Raises:
            ValueError: It is another generation, or it was shaped with another user-defined function.
        """
        if generation.number != self.generation + 1:
            raise ValueError(f"the next generation is {self.generation + 1}, got {generation.number}")
        with adopted(self, generation.settings):
            self._start_generation()
            # torch sets this when ``step`` is called; schedulers warn without it.
            self._opt_called = True
            return self._advance(generation.scores, generation.statistics, lambda _: generation.again)

    @explain_unknown(TRAIN_ALIASES)
    def train(
        self,
        num_generations: int,
        verbose: bool = True,
        log_every: int = 1,
        callback: Callbacks = None,
        checkpoints: Checkpoints | None = None,
    ) -> dict[str, Any]:
        """Run generations, going on from where the trainer is.

        Args:
            num_generations: Number of generations to run.
            verbose: Whether to show a progress bar with the mean and best fitness.
            log_every: How often a ``callback`` that is a function is called, in generations. It is also called after
                the last one.
            callback: A function, called with the generation, counted from 1, and the list of mean fitnesses up to it;
                or a :class:`~eggroll_trainer.callbacks.Callback`, which sees every generation; or a list of both. A
                callback that returns True, or raises ``StopIteration``, ends training after the generation. With
                several processes, the first one calls it. Changes that it makes to the trainer's arguments, parameter
                groups or ``requires_grad`` of parameters then reach all processes.
            checkpoints: Where and how often to save the run. It is also saved when training ends, even by Ctrl-C or an
                exception. With checkpoints, a SIGTERM, as job schedulers send it, abandons the current generation and
                ends the script with ``SystemExit(143)``.

        Returns:
            The metrics of the last generation; ``stopped_by``, the name of the callback that ended training, or None;
            and ``fitness_history``, the list of mean fitnesses. Printing the dictionary shortens long lists.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: ``num_generations`` is negative or ``log_every`` less than 1.
            FileExistsError: The folder of ``checkpoints`` holds another run, which this trainer does not continue.
        """
        return run(self, num_generations, verbose, log_every, callback, checkpoints)

    def evaluate_fitness(self, model: nn.Module) -> float:
        """Return the fitness of one model, such as ``trainer.model`` or ``trainer.get_best_model()``.

        If the fitness function returns a score for each of several tasks, this is their mean. A subclass may override
        this method; members are then evaluated with it.

        Raises:
            TypeError: The fitness function does not return a number.
            ValueError: It returns an array of the wrong shape.
        """
        if not is_batched(self.fitness_fn):
            return float(mean_over_tasks(to_score(self.fitness_fn(model))))
        return float(mean_over_tasks(to_scores(self.fitness_fn(Population.of(model)), 1)[0]))

    def _adapt(self, metrics: dict[str, Any], scores: CheckedScores) -> None:
        """Adapt ``learning_rate`` and ``sigma`` after a generation, if they are ``"auto"``."""

    def _settings(self) -> dict[str, Any]:
        return settings_of(self)

    def _check_sizes(self) -> None:
        """Check ``population_size`` and ``chunk_size``, which the user may change between generations."""
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
                "every parameter is frozen (requires_grad=False), so there is nothing to train; unfreeze some with"
                " requires_grad_(True)"
            )
        for group in self.param_groups:
            validation.check_real("learning_rate", group["lr"], positive=False)
            validation.check_real("sigma", group["sigma"], positive=True)
            validation.check_anchor_decay(group["anchor_decay"], group["lr"])
        self._centre.check_model(self.model)

    # Hooks of subclasses and engines.

    def _group_defaults(self) -> dict[str, Any]:
        """Return further options of parameter groups with their defaults."""
        return {}

    def _make_method(self) -> Method:
        """Return how members are perturbed, and how the update follows from their fitness."""
        return Sampled(self)

    def _restart_forwards(self) -> None:
        self._forwards = Forwards(compile=self.compile, budget=self._budget)

    def evaluate_chunk(self, chunk: Chunk) -> Outcome:
        """Evaluate some members of the current generation in this process; engines call it."""
        return self._evaluator.evaluate_chunk(chunk)

    def _fitness_fn(self) -> Callable[..., Any]:
        """Return the fitness function, or :meth:`evaluate_fitness` if a subclass overrides it."""
        overridden = type(self).evaluate_fitness is not ESTrainer.evaluate_fitness
        return self.evaluate_fitness if overridden else self.fitness_fn
