"""Time limits and Ctrl-C at any moment of a generation leave nothing behind, and none is lost.

``EGGROLL_TEST_INTERRUPTIONS=100000`` fires so many of them in the quick test.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import NEEDS_COMPILER, X, Y, assert_same, make, network
from surroundings import surroundings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eggroll_trainer import ESTrainer, Population, batched
from eggroll_trainer.distributed import LocalEngine

QUICK, THOROUGH = int(os.environ.get("EGGROLL_TEST_INTERRUPTIONS", 100)), 2500


class Dropped:
    """What an exception of a signal is lost in."""

    kept: weakref.WeakValueDictionary[int, Dropped] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.kept[id(self)] = self

    def __del__(self) -> None:
        sum(range(50))


def modes(x: Tensor) -> None:
    """Go through torch's modes, as fitness functions do."""
    for _ in range(3):
        with torch.inference_mode():
            Dropped()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            x @ x.T
        with torch.device("cpu"), FlopCounterMode(display=False):
            torch.zeros(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.vmap(torch.sin)(x)


def plain(model: nn.Module) -> float:
    x, y = X[:8], Y[:8]
    with torch.inference_mode():
        result = model(x)
    modes(x[:2])
    return -(model(x) - y + 0 * result.clone()).square().mean().item()


@batched
def together(population: Population) -> Tensor:
    result = population(X)
    modes(X[:2])
    return -(population.each(result.detach()[..., :1].expand(-1, -1, 4)) - Y + 0 * result).square().mean((1, 2))


def cartpole() -> ESTrainer:
    pytest.importorskip("gymnasium")
    from eggroll_trainer.rl.policies import MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn
    from eggroll_trainer.rl.simulators import make_environment

    env = make_environment("CartPole-v1", {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = MLPPolicy(env.observation_space, env.action_space, hidden=(8,))
    return make(model=policy, fitness_fn=EpisodeReturn("CartPole-v1", max_steps=15))


CASES: dict[str, Callable[[], ESTrainer]] = {
    "compiled": lambda: make(model=network(), fitness_fn=together, compile=True),
    "batched": lambda: make(model=network(), fitness_fn=together),
    "coalesced": lambda: make(model=network(), fitness_fn=plain),
    "reinforcement learning": cartpole,
}


def contents(model: nn.Module) -> dict[str, Any]:
    """Return what the model holds: objects by identity, besides values."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    objects = {
        name: {key: id(value) for key, value in module.__dict__.items()}
        | {
            f"{kind}.{key}": id(value)
            for kind in ("_parameters", "_buffers")
            for key, value in getattr(module, kind).items()
        }
        for name, module in model.named_modules()
    }
    return {"state": state, "objects": objects, "training": [module.training for module in model.modules()]}


class Presser(threading.Thread):
    """Presses Ctrl-C after a time, unless told in time that it is over."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds, self.over, self.fired = seconds, threading.Event(), False

    def run(self) -> None:
        if not self.over.wait(self.seconds):
            self.fired = True
            os.kill(os.getpid(), signal.SIGINT)


def with_a_time_limit(trainer: Any, seconds: float) -> bool:
    """Make a step, and return whether it was interrupted."""
    trainer.engine.timeout = seconds
    try:
        trainer.step()
    except TimeoutError as error:
        assert "took longer" in str(error)
        return True
    finally:
        trainer.engine.timeout = None
    return False


def with_ctrl_c(trainer: Any, seconds: float) -> bool:
    presser, interrupted = Presser(seconds), False
    try:
        presser.start()
        trainer.step()
        presser.over.set()
        presser.join()
    except KeyboardInterrupt:
        interrupted = True
    presser.over.set()
    presser.join()
    assert interrupted == presser.fired, "a Ctrl-C was lost"
    return interrupted


def interrupt(case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    trainer: Any = CASES[case]()
    trainer.engine = LocalEngine(retries=0)
    durations = []
    for _ in range(6):
        start = time.perf_counter()
        trainer.step()
        durations.append(time.perf_counter() - start)
    typical = statistics.median(durations[1:])
    moments = random.Random(case)
    around = surroundings()
    interrupted = {with_a_time_limit: 0, with_ctrl_c: 0}
    for i in range(count):
        way = with_ctrl_c if i % 5 == 4 else with_a_time_limit
        generation, before, parameters = trainer.generation, contents(trainer.model), trainer.current_params
        start = time.perf_counter()
        hit = way(trainer, moments.uniform(1e-6, 1.1 * typical))
        if not hit:
            # The machine may have other work at times.
            typical = 0.8 * typical + 0.2 * (time.perf_counter() - start)
        interrupted[way] += hit
        assert surroundings() == around
        assert not lost, lost[0]
        assert trainer.generation == len(trainer.history["fitness"])
        assert trainer.generation == generation + 1 or (hit and trainer.generation == generation)
        after = contents(trainer.model)
        if trainer.generation == generation:
            assert torch.equal(trainer.current_params, parameters)
        else:
            # The step has moved them.
            del before["state"], after["state"]
        assert_same(after, before)
    assert sum(interrupted.values()) >= count // 10
    twin = CASES[case]()
    twin.train(trainer.generation, verbose=False)
    assert twin.step() == trainer.step()
    assert_same(trainer.state_dict(), twin.state_dict())


@pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")
@pytest.mark.parametrize(
    "case", [pytest.param("compiled", marks=NEEDS_COMPILER), *(c for c in CASES if c != "compiled")]
)
def test_interruptions(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(case, QUICK // len(CASES), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_thousands_of_interruptions(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(case, THOROUGH // len(CASES), monkeypatch)
