"""An engine over Ray: a pool of workers that may die, be slow, join or leave."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from .._utils.validation import check_int, check_real
from .engine import Chunk, Evaluator, LocalEngine, Outcome

# Seconds that the engine waits for a result before it checks time limits.
_LOOK_EVERY = 1.0


class RayEngine(LocalEngine):
    """Evaluates the chunks of a population with Ray workers. Use it for fitness functions that are slow or uneven.

    The script runs in one process, which makes the steps. Each worker has a copy of the trainer. Trained weights are
    put into Ray's object store once a generation, others when they have changed. If a worker dies, another one
    evaluates its chunk again, with the same result. A chunk that takes much longer than others is given to a second
    worker, and the first result counts. Workers join and leave between generations as the cluster grows and shrinks.

    Args:
        workers: Number of workers. If None, as many as fit in the cluster, which is checked in every generation.
        threads: Number of torch's threads in each worker. Results are those of a local run with as many threads.
        timeout: Seconds that the evaluation of a chunk may take. After that, its worker is killed.
        retries: How often a chunk is evaluated again after a timeout, or after its worker has died.
        straggler: An idle worker gets a second copy of a chunk that has taken this many times the median duration of
            the others.
        worker_options: Ray's options for a worker, such as ``{"num_gpus": 1}``. ``num_cpus`` is ``threads`` by default.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> engine = RayEngine(threads=1, timeout=600, worker_options={"num_gpus": 1})  # EGGROLLTrainer(engine=engine)
        >>> engine.threads, engine.timeout
        (1, 600.0)
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        threads: int = 1,
        timeout: float | None = None,
        retries: int = 3,
        straggler: float = 3.0,
        worker_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(timeout=timeout, retries=retries)
        self.workers = None if workers is None else check_int("workers", workers, 1)
        self.threads = check_int("threads", threads, 1)
        self.straggler = check_real("straggler", straggler, positive=True)
        self.worker_options = {"num_cpus": self.threads, **(worker_options or {})}
        if not ray.is_initialized():
            ray.init()
        # The trainer and fitness function that were sent last, and Ray's reference to their copy.
        self._sent: tuple[Evaluator, Any] | None = None
        self._copy: Any = None
        # Ray's reference to the untrained tensors. They may be most of a model, so they are sent only when they change.
        self._untrained: Any = None
        self._actors: list[Any] = []
        # All running tasks, including those of earlier generations that are no longer needed.
        self._running: dict[Any, _Task] = {}
        self._served = 0

    def evaluate(self, trainer: Evaluator, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Return the outcomes of all chunks."""
        self._send(trainer)
        self._served += 1
        state = self._put_state(trainer)
        waiting, failures = deque(chunks), dict.fromkeys(chunks, 0)
        outcomes: dict[Chunk, Outcome] = {}
        durations: list[float] = []
        starts_failed = 0
        self._adapt()
        while len(outcomes) < len(chunks):
            self._give_out(waiting, outcomes, durations, state)
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_EVERY)
            lost: list[_Task] = []
            for reference in done:
                task = self._running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except RayActorError as error:
                    lost.append(task)
                    self._actors.remove(task.actor)
                    starts_failed += task.chunk is None
                    if starts_failed > self.retries:
                        raise RuntimeError(
                            f"Ray's workers die while they start, {starts_failed} times: see Ray's logs"
                        ) from error
                    continue
                except RayTaskError as error:
                    if task.served == self._served:
                        raise error.as_instanceof_cause() from None
                    continue
                if task.served == self._served and task.chunk is not None:
                    durations.append(time.monotonic() - task.started)
                    outcomes.setdefault(task.chunk, outcome)
            lost += self._kill_late()
            self._take_back(trainer, lost, waiting, failures, outcomes)
        return [outcomes[chunk] for chunk in chunks]

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._running, self._sent, self._copy, self._untrained = [], {}, None, None, None

    def __del__(self) -> None:
        # At interpreter exit, Ray may be partly gone already, with its workers.
        with contextlib.suppress(Exception):
            if ray.is_initialized():
                self.close()

    def _send(self, trainer: Evaluator) -> None:
        """Put a copy of the trainer into the object store, unless workers have a current one."""
        if self._sent is not None and self._sent[0] is trainer and self._sent[1] is trainer.fitness_fn:
            return
        self._sent, self._copy = (trainer, trainer.fitness_fn), ray.put(trainer)

    def _put_state(self, trainer: Evaluator) -> list[Any]:
        """Return references to the copy of the trainer, to its working state, and to its untrained tensors."""
        state = trainer.working_state()
        untrained = state.pop("untrained")
        if self._untrained is None or not _equal(ray.get(self._untrained), untrained):
            self._untrained = ray.put(untrained)
        # In a list, so that Ray passes the references, not the objects.
        return [self._copy, ray.put(state), self._untrained]

    def _adapt(self) -> None:
        """Start or end workers until there are ``workers`` of them, or as many as fit in the cluster."""
        wanted = self.workers
        if wanted is None:
            cpus = ray.cluster_resources().get("CPU", 1)
            wanted = max(1, int(cpus // max(self.worker_options["num_cpus"], 1e-3)))
        # End busy workers first: they work for an earlier generation, and are not waited for.
        busy = {id(task.actor) for task in self._running.values()}
        self._actors.sort(key=lambda actor: id(actor) in busy)
        self._actors, surplus = self._actors[:wanted], self._actors[wanted:]
        for one_too_many in surplus:
            ray.kill(one_too_many)
        kept = {id(actor) for actor in self._actors}
        self._running = {r: task for r, task in self._running.items() if id(task.actor) in kept}
        for _ in range(wanted - len(self._actors)):
            actor: Any = ray.remote(**self.worker_options)(_Worker).remote(self.threads)
            self._actors.append(actor)
            # A new worker counts as busy until it has started.
            self._running[actor.ready.remote()] = _Task(actor, None, self._served, time.monotonic())

    def _give_out(
        self, waiting: deque[Chunk], outcomes: Mapping[Chunk, Outcome], durations: list[float], state: list[Any]
    ) -> None:
        busy = {id(task.actor) for task in self._running.values()}
        for actor in [actor for actor in self._actors if id(actor) not in busy]:
            chunk = waiting.popleft() if waiting else self._straggler(outcomes, durations)
            if chunk is None:
                return
            reference = actor.evaluate.remote(self._served, state, chunk)
            self._running[reference] = _Task(actor, chunk, self._served, time.monotonic())

    def _straggler(self, outcomes: Mapping[Chunk, Outcome], durations: list[float]) -> Chunk | None:
        """Return a late chunk that only one worker evaluates, or None."""
        if not durations:
            return None
        late = time.monotonic() - self.straggler * statistics.median(durations)
        now = [t for t in self._running.values() if t.served == self._served and t.chunk not in outcomes]
        given = [task.chunk for task in now]
        for task in sorted(now, key=lambda task: task.started):
            if task.chunk is not None and task.started < late and given.count(task.chunk) == 1:
                return task.chunk
        return None

    def _kill_late(self) -> list[_Task]:
        """Kill workers that exceed the timeout, and return their tasks."""
        if self.timeout is None:
            return []
        latest = time.monotonic() - self.timeout
        late = {r: t for r, t in self._running.items() if t.chunk is not None and t.started < latest}
        for reference, task in late.items():
            ray.kill(task.actor)
            self._actors.remove(task.actor)
            del self._running[reference]
        return list(late.values())

    def _take_back(
        self,
        trainer: Evaluator,
        lost: list[_Task],
        waiting: deque[Chunk],
        failures: dict[Chunk, int],
        outcomes: Mapping[Chunk, Outcome],
    ) -> None:
        """Queue the chunks of dead workers again, and replace the workers."""
        for task in lost:
            if task.served != self._served or task.chunk is None or task.chunk in outcomes:
                continue
            failures[task.chunk] += 1
            if failures[task.chunk] > self.retries:
                if self.timeout is not None and time.monotonic() - task.started > self.timeout:
                    raise TimeoutError(self._too_slow(trainer, task.chunk))
                raise RuntimeError(
                    f"the worker of {task.chunk} of generation {trainer.generation + 1} died, {failures[task.chunk]}"
                    " times: out of memory, or a crash in native code? See Ray's logs; the parameters were not changed"
                )
            waiting.appendleft(task.chunk)
        if lost:
            self._adapt()


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class _Task(NamedTuple):
    """A task of a worker: a chunk of evaluation number ``served``, or the worker's start if ``chunk`` is None."""

    actor: Any
    chunk: Chunk | None
    served: int
    started: float


class _WorkersEngine(LocalEngine):
    """The engine of a worker's copy of the trainer. Rank 1 makes it leave warnings to the script's process."""

    rank = 1


class _Worker:
    """A process with a copy of the trainer."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trainer: Any = None
        self.copied: Any = None
        self.served = -1

    def ready(self) -> None:
        """Do nothing; it returns once the worker has started."""

    def evaluate(self, served: int, state: list[Any], chunk: Chunk) -> Outcome:
        """Return the outcome of a chunk."""
        if served != self.served:
            if state[0] != self.copied:
                self.trainer, self.copied = ray.get(state[0]), state[0]
                self.trainer.engine = _WorkersEngine()
            changing, untrained = ray.get(state[1:])
            self.trainer.set_working_state({**changing, "untrained": untrained})
            self.served = served
        return self.trainer.evaluate_chunk(chunk)
