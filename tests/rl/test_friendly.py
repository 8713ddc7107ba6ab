"""What ``eggroll rl`` says of its budget, its progress and its end; and the best policy where returns are luck."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from eggroll_trainer import EGGROLLTrainer  # noqa: E402
from eggroll_trainer.rl import training  # noqa: E402
from eggroll_trainer.rl.budget import described, generations, with_compile  # noqa: E402
from eggroll_trainer.rl.policies import MLPPolicy  # noqa: E402
from eggroll_trainer.rl.rollout import EpisodeReturn  # noqa: E402
from eggroll_trainer.rl.settings import TASKS, Settings, settings_for  # noqa: E402


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            Settings("Pendulum-v1", steps=1_000_000, population_size=256),
            "1,000,000 steps are 20 generations of 256 members",
        ),
        (
            Settings("Pendulum-v1", steps=1_000_000, population_size=512),
            "10 generations of 512 members: too few to learn",
        ),
        (
            Settings("LunarLander-v3", steps=1_000_000, population_size=256),
            "1,000,000 steps are at least 4 generations of 256 members, and more if episodes end early",
        ),
        (
            Settings("LunarLander-v3", steps=1_000_000, population_size=256, max_steps=100),
            "1,000,000 steps are at least 40 generations of 256 members",
        ),
        (Settings("Nothing-v0", steps=5_000), "5,000 steps, in generations of 64 members"),
    ],
)
def test_what_a_budget_buys(settings: Settings, text: str) -> None:
    assert text in described(settings)


def test_generations_are_rounded_up() -> None:
    assert generations(Settings("CartPole-v1", steps=64 * 500 * 3 + 1)) == 4
    assert generations(Settings("CartPole-v1", steps=64 * 500 * 3, episodes=3)) == 1


def test_short_runs_are_not_compiled(tmp_path: Path) -> None:
    short, long = Settings("FrozenLake-v1", steps=20_000), Settings("FrozenLake-v1", steps=20_000_000)
    assert with_compile(short, tmp_path).compile is False and with_compile(long, tmp_path).compile is True
    assert with_compile(dataclasses.replace(long, compile=False), tmp_path).compile is False
    # A run that goes on longer is not compiled halfway, which would change its numbers.
    (tmp_path / "config.json").write_text(json.dumps({"compile": False}))
    assert with_compile(dataclasses.replace(long, resume=True), tmp_path).compile is False


def test_settings_of_published_runs_are_complete() -> None:
    """What the documented results were made with does not depend on the defaults for other tasks."""
    expected = {"hidden": (64, 64), "optimizer": "sgd"}
    for name in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "Ant-v5", "Humanoid-v5"):
        settings = settings_for(name)
        assert {key: getattr(settings, key) for key in expected} == expected
        assert with_compile(settings, Path("runs")).compile
        given = TASKS[name].keys()
        assert given >= {"policy", "steps", "population_size", "sigma", "learning_rate", "optimizer", "shaping"}


class Bar:
    """Stands in for the progress bar, and notes what it is told."""

    bars: list[Bar] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.n, self.updates, self.texts = options["initial"], [], []  # type: ignore[var-annotated]
        self.bars.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def update(self, n: int) -> None:
        self.n += n
        self.updates.append(self.n)

    def set_postfix_str(self, text: str) -> None:
        self.texts.append(text)


def test_progress_within_a_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "tqdm", Bar)
    settings = Settings(
        *("Pendulum-v1", 1_600), population_size=4, eval_every=100, eval_episodes=2, video=False, out=tmp_path / "run"
    )
    run = training.Run(settings)
    run.train()
    (bar,) = Bar.bars
    # Four environments a step, all the way, and no more than there were.
    assert bar.updates[:3] == [4, 8, 12] and bar.updates == sorted(bar.updates) and bar.n == 1_600
    assert bar.texts[0] == "first generation" and all("nan" not in text for text in bar.texts)
    # A tenth of the steps is over after every generation.
    assert "generation 1, mean" in bar.texts[1] and "centre -" in bar.texts[1]
    assert run.fitness.on_steps is None


def made(tmp_path: Path, **options: Any) -> training.Run:
    settings = Settings(
        "CartPole-v1", **{"population_size": 16, "eval_episodes": 8, "out": tmp_path / "run", **options}
    )
    return training.Run(settings)


def test_it_says_when_nothing_was_learnt(tmp_path: Path) -> None:
    run = made(tmp_path, steps=100, learning_rate=0.0)
    run.train()
    text = run.improvement()
    assert text is not None and "has not improved" in text and "on the same 8 episodes" in text


def test_it_is_silent_when_something_was(tmp_path: Path) -> None:
    run = made(tmp_path, steps=100, learning_rate=0.0, policy="linear", normalize=False)
    run.train()
    # Position, velocity, angle and its velocity to the logits of left and right: this balances.
    weights = torch.tensor([0.1, 0.5, 5.0, 2.0])
    run.policy.load_state_dict({"body.0.weight": torch.stack([-weights, weights]), "body.0.bias": torch.zeros(2)})
    assert run.improvement() is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_best_policy_plays_again() -> None:
    episodes = EpisodeReturn("CartPole-v1")
    policy = MLPPolicy(*episodes.spaces(), hidden=(8,))
    before = copy.deepcopy(policy.state_dict())
    trainer = EGGROLLTrainer(model=policy, fitness_fn=episodes, population_size=16, noise_reuse=2, seed=0)
    trainer.train(2, verbose=False)
    assert trainer.best_fitness != max(trainer.history["fitness"])
    # What it plays then is no part of the training.
    other = EpisodeReturn("CartPole-v1")
    other.noisy = False
    twin_policy = MLPPolicy(*other.spaces(), hidden=(8,))
    twin_policy.load_state_dict(before)
    twin = EGGROLLTrainer(model=twin_policy, fitness_fn=other, population_size=16, noise_reuse=2, seed=0)
    twin.train(2, verbose=False)
    assert twin.best_fitness == max(twin.history["fitness"])
    assert other.steps == episodes.steps and torch.equal(twin.current_params, trainer.current_params)
