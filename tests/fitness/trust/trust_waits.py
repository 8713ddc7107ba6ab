"""Variations: locks and pools, for which members wait, or fail, if another one keeps them while the model is called."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from trust_oracle import Build, Fitness, Variation, X, loss
from trust_outer import twice
from trust_things import ArraySimulator, play


def under(make: Callable[[], Any]) -> Build:
    """A lock, taken for the time of an episode in one simulator that all share."""

    def build(model: nn.Module) -> Fitness:
        lock, simulator = make(), ArraySimulator()

        def fitness(model: Any) -> float:
            with lock:
                return play(model, simulator)

        return fitness

    return build


def under_a_lock_taken_in_turns(model: nn.Module) -> Fitness:
    """A lock taken and given back between the calls of the model, but not around all."""
    lock = threading.Lock()

    def fitness(model: Any) -> float:
        score = loss(model(X))
        for t in range(2, 4):
            lock.acquire()
            score += loss(model(X * t))
            lock.release()
        return score

    return fitness


def pool_of(size: int, patient: bool) -> Build:
    """A few simulators in a queue: a member that finds none waits, or fails."""

    def build(model: nn.Module) -> Fitness:
        pool: queue.Queue[ArraySimulator] = queue.Queue()
        for _ in range(size):
            pool.put(ArraySimulator())

        def fitness(model: Any) -> float:
            simulator = pool.get(block=patient)
            try:
                return play(model, simulator)
            finally:
                pool.put(simulator)

        return fitness

    return build


def pool_without_finally(model: nn.Module) -> Fitness:
    pool: queue.Queue[ArraySimulator] = queue.Queue()
    pool.put(ArraySimulator())

    def fitness(model: Any) -> float:
        simulator = pool.get()
        score = play(model, simulator)
        pool.put(simulator)
        return score

    return fitness


def bounded_queue(model: nn.Module) -> Fitness:
    """Puts its outputs into a queue with room for four, and takes them out at the end."""
    outputs: queue.Queue[Tensor] = queue.Queue(maxsize=4)

    def fitness(model: Any) -> float:
        for t in range(1, 4):
            outputs.put(model(X * t))
        return sum(loss(outputs.get()) for _ in range(3))

    return fitness


def condition(model: nn.Module) -> Fitness:
    """Waits until the resource is free."""
    changed, busy = threading.Condition(), False

    def fitness(model: Any) -> float:
        nonlocal busy
        with changed:
            changed.wait_for(lambda: not busy)
            busy = True
        score = twice(model)
        with changed:
            busy = False
            changed.notify()
        return score

    return fitness


def too_many_open(model: nn.Module) -> Fitness:
    """At most three may be open at a time, as with files or licences."""
    held: set[int] = set()

    def fitness(model: Any) -> float:
        if len(held) == 3:
            raise OSError(24, "Too many open files")
        handle = max(held, default=0) + 1
        held.add(handle)
        try:
            return twice(model)
        finally:
            held.remove(handle)

    return fitness


def not_reentrant(model: nn.Module) -> Fitness:
    """A simulator that must be stopped before it is started again."""
    running = False

    def fitness(model: Any) -> float:
        nonlocal running
        assert not running, "already running"
        running = True
        try:
            return twice(model)
        finally:
            running = False

    return fitness


WAITING: dict[str, Build] = {
    "lock": under(threading.Lock),
    "reentrant_lock": under(threading.RLock),
    "semaphore": under(lambda: threading.Semaphore(1)),
    "bounded_semaphore": under(lambda: threading.BoundedSemaphore(1)),
    "condition_as_a_lock": under(threading.Condition),
    "lock_in_turns": under_a_lock_taken_in_turns,
    "pool_of_one": pool_of(1, True),
    "pool_of_three": pool_of(3, True),
    "impatient_pool": pool_of(3, False),
    "pool_without_finally": pool_without_finally,
    "condition": condition,
    "too_many_open": too_many_open,
    "not_reentrant": not_reentrant,
}

VARIATIONS = {f"{name}-held": Variation(build) for name, build in WAITING.items()}

# Left in use where members have waited for each other: full, for whoever comes later.
STUCK = {"bounded_queue": Variation(bounded_queue)}
