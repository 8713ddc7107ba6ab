"""Greenlets that are used again: each job is on its own, whatever the one before it left behind."""

from __future__ import annotations

import contextvars
import threading

import greenlet
import pytest
import torch
from helpers import X, fitness, make, network
from torch import nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.fitness.together import workers

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)


def test_a_greenlet_serves_many_jobs_each_in_a_context_of_its_own() -> None:
    hub, seen = greenlet.getcurrent(), []

    def job() -> None:
        seen.append((VARIABLE.get(), greenlet.getcurrent()))
        VARIABLE.set(99)

    VARIABLE.set(1)
    for value in (1, 2, 3):
        VARIABLE.set(value)
        workers.start(job, hub)
    assert [value for value, _ in seen] == [1, 2, 3] and VARIABLE.get() == 3
    assert len({id(worker) for _, worker in seen}) == 1


def test_jobs_that_wait_do_not_share_one() -> None:
    hub, order = greenlet.getcurrent(), []

    def job(name: str) -> None:
        order.append(f"{name} begins")
        hub.switch()
        order.append(f"{name} ends")

    a, b = workers.start(lambda: job("a"), hub), workers.start(lambda: job("b"), hub)
    assert a is not b
    b.switch()
    a.switch()
    assert order == ["a begins", "b begins", "b ends", "a ends"]


def test_what_is_idle_is_bounded_and_each_threads_own() -> None:
    hub = greenlet.getcurrent()
    waiting = [workers.start(hub.switch, hub) for _ in range(workers._MOST + 10)]
    for worker in waiting:
        worker.switch()
    assert len(workers._idle.greenlets) == workers._MOST and sum(worker.dead for worker in waiting) >= 10
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(len(workers._idle.greenlets)))
    thread.start()
    thread.join()
    assert others == [0]


def test_a_trainer_inside_a_fitness_function() -> None:
    """Two evaluations cannot take turns in each other: the outer members run alone."""

    def outer(model: nn.Module) -> float:
        inner = EGGROLLTrainer(model=network(), fitness_fn=fitness, population_size=4, seed=0)
        with torch.no_grad():
            first = model(X).sum().item()
        inner.step()
        with torch.no_grad():
            return first + model(X).sum().item() + inner.best_fitness

    trainer = make(fitness_fn=outer)
    twin = make(fitness_fn=outer, coalesce=False)
    with pytest.warns(RuntimeWarning, match="it evaluates a population of its own"):
        trainer.step()
    twin.step()
    assert trainer.history["mean_fitness"] == pytest.approx(twin.history["mean_fitness"], rel=1e-5)


@pytest.mark.parametrize("failing", [RuntimeError, KeyboardInterrupt, StopIteration])
def test_a_job_that_fails_leaves_the_others_usable(failing: type[BaseException]) -> None:
    count = 0

    def sometimes(model: nn.Module) -> float:
        nonlocal count
        count += 1
        number = count
        value = fitness(model)
        if number == 5:
            raise failing("no")
        return value

    trainer, twin = make(fitness_fn=sometimes, coalesce="unchecked"), make()
    with pytest.raises(failing):
        trainer.step()
    for _ in range(2):
        assert trainer.step() == twin.step()
