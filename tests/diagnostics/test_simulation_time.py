"""One warning where a plain function's simulator takes most of the time."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

gymnasium = pytest.importorskip("gymnasium")

from eggroll_trainer import EGGROLLTrainer  # noqa: E402
from eggroll_trainer.diagnostics import simulators  # noqa: E402
from eggroll_trainer.diagnostics.simulators import plays_environment, simulator_advice  # noqa: E402


def play(model: nn.Module) -> float:
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(20):
        with torch.no_grad():
            action = int(model(torch.as_tensor(observation)).argmax())
        # A simulator that takes its time.
        time.sleep(0.002)
        observation, reward, ended, _, _ = env.step(action)
        total += float(reward)
        if ended:
            break
    return total


def through_another(model: nn.Module) -> float:
    return play(model)


def imports_inside(model: nn.Module) -> float:
    import gymnasium

    return float(gymnasium.make("CartPole-v1").reset()[0][0])


class Player:
    def __init__(self) -> None:
        self.env: Any = gymnasium.make("CartPole-v1")

    def __call__(self, model: nn.Module) -> float:
        return float(self.env.reset()[0][0])

    def method(self, model: nn.Module) -> float:
        return float(self.env.reset()[0][0])


def test_functions_that_play() -> None:
    env = gymnasium.make("CartPole-v1")
    for function in (
        *(play, through_another, imports_inside, Player(), Player().method, lambda model: env.reset()),
        functools.partial(lambda env, model: env.reset(), env),
    ):
        assert plays_environment(function), function
    for function in (lambda model: 0.0, len, nn.Linear(1, 1), functools.partial(max, 1)):
        assert not plays_environment(function), function


def test_when_it_speaks() -> None:
    message = simulator_advice(play, 64, 4.0, 0.5)
    assert message is not None and "64 members took 4.0 s" in message and "forwards took 0.5 s of it" in message
    assert "own code took 3.5 s" in message and "EpisodeReturn" in message
    # Quick; mostly the model; no turns are taken; no environment.
    for case in ((play, 64, 0.5, 0.1), (play, 64, 4.0, 3.0), (play, 64, 4.0, 0.0), (lambda model: 0.0, 64, 4.0, 0.5)):
        assert simulator_advice(*case) is None


@pytest.mark.parametrize("speaks", [True, False])
def test_in_a_run_it_speaks_once(speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = (lambda model: sum(float(model(torch.zeros(4))[0]) for _ in range(20))) if not speaks else play
    monkeypatch.setattr(simulators, "_SECONDS", 0.0)
    trainer = EGGROLLTrainer(model=nn.Linear(4, 2), fitness_fn=quick, population_size=4, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Members are checked in generations 1, 2 and 4.
        trainer.train(6, verbose=False)
    said = [str(warning.message) for warning in caught if "EpisodeReturn" in str(warning.message)]
    assert len(said) == speaks
