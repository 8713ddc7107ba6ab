"""What a generation depends on may change during a run: a replay of its scores and a checkpoint follow."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Custom, assert_same, goes_on, make, network
from torch import Tensor

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer
from eggroll_trainer.callbacks import ScoreLog
from eggroll_trainer.checkpoints.generation import FIXED, Settings
from eggroll_trainer.fitness.shaping import shaper_name, zscore


def halved(scores: Tensor) -> Tensor:
    return zscore(scores) / 2


def tempered(temperature: float) -> Callable[[Tensor], Tensor]:
    return lambda scores: (scores / temperature).softmax(0) - 1 / len(scores)


def set_all(**values: Any) -> Callable[[Any], None]:
    def change(trainer: Any) -> None:
        for name, value in values.items():
            setattr(trainer, name, value)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "noise_reuse": set_all(noise_reuse=2),
    "group_size": set_all(group_size=4),
    "shaping": set_all(shaping="centered_ranks"),
    "shaping, another function": set_all(shaping=zscore),
    "chunk_size": set_all(chunk_size=3),
    "population_size": set_all(population_size=12),
    "several": set_all(population_size=16, noise_reuse=2, shaping="antithetic_sign", group_size=8, chunk_size=6),
    "noise": set_all(noise="rademacher"),
    "seed": set_all(seed=7),
    "options": set_all(sigma=0.3, learning_rate=0.01),
    "freezing": lambda trainer: trainer.model[0].requires_grad_(False),
}


def run(trainer: ESTrainer, log: ScoreLog, generations: int) -> None:
    for _ in range(generations):
        log.begin(trainer)
        trainer.step()
        log.append(trainer)


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer])
@pytest.mark.parametrize("name", CHANGES)
def test_a_replay_follows_changes(cls: type[ESTrainer], name: str, tmp_path: Path) -> None:
    log, trainer, unchanged = ScoreLog(tmp_path / "scores.jsonl"), make(cls), make(cls)
    run(trainer, log, 2)
    CHANGES[name](trainer)
    run(trainer, log, 2)
    again = make(cls, fitness_fn=lambda model: 0.0)
    assert log.replay(again) == 4
    assert_same(again.state_dict(), trainer.state_dict())
    again.fitness_fn = trainer.fitness_fn
    goes_on(again, trainer)
    unchanged.train(4, verbose=False)
    assert not torch.equal(unchanged.current_params, trainer.current_params) or name == "shaping, another function"


def test_a_replay_of_a_custom_trainer_follows_changes(tmp_path: Path) -> None:
    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), make(Custom)
    run(trainer, log, 1)
    trainer.population_size, trainer.chunk_size = 12, 5
    run(trainer, log, 1)
    again = make(Custom)
    log.replay(again)
    assert_same(again.state_dict(), trainer.state_dict())


def test_a_replay_in_parts_follows_changes(tmp_path: Path) -> None:
    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), make()
    run(trainer, log, 2)
    trainer.noise_reuse, trainer.shaping = 2, "raw"
    run(trainer, log, 1)
    state = trainer.state_dict()
    trainer.noise_reuse = 4
    run(trainer, log, 2)
    again = make()
    assert log.replay(again, until=3) == 3
    assert_same(again.state_dict(), state)
    log.replay(again)
    assert_same(again.state_dict(), trainer.state_dict())
    # From a checkpoint, into a trainer that is as this one was made.
    later = make()
    with pytest.warns(RuntimeWarning, match=r"going on with noise_reuse=0 \(was 2\), shaping='zscore' \(was 'raw'\)"):
        later.load_state_dict(state)
    log.replay(later)
    assert_same(later.state_dict(), trainer.state_dict())


def test_a_replay_needs_the_functions_of_the_user(tmp_path: Path) -> None:
    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), make()
    run(trainer, log, 1)
    trainer.shaping = halved
    run(trainer, log, 1)
    trainer.shaping = tempered(0.5)
    run(trainer, log, 1)
    again = make()
    with pytest.raises(
        ValueError, match=r"shaped by test_settings.halved:\w+ and the trainer's shaping is zscore: set"
    ):
        log.replay(again)
    assert again.generation == 1 and again.shaping == "zscore"
    again.shaping = halved
    with pytest.raises(ValueError, match="shaped by test_settings.tempered"):
        log.replay(again)
    again.shaping = tempered(1.0)
    with pytest.raises(ValueError, match="shaped by test_settings.tempered"):
        log.replay(again)
    again.shaping = tempered(0.5)
    assert log.replay(again) == 3
    assert_same(again.state_dict(), trainer.state_dict())


def test_a_repeated_generation_that_fails_changes_nothing(tmp_path: Path) -> None:
    trainer, again, twin = make(), make(), make()
    trainer.step()
    CHANGES["several"](trainer)
    trainer.seed, trainer.sigma = 9, 0.2
    trainer.step()
    last = trainer.last_generation
    goes_on(again, twin)
    for broken in (
        last._replace(number=3, settings={**last.settings, "noise_reuse": 3}),
        last._replace(number=3, scores=last.scores * torch.nan),
        last._replace(number=3, settings={**last.settings, "shaping": "elsewhere.function:0"}),
    ):
        with pytest.raises(ValueError):
            again.repeat(broken)
        assert_same(again.state_dict(), twin.state_dict())
        assert again.chunk_size is None
    goes_on(again, twin)


def test_the_settings_of_an_optimizer_count(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path / "scores.jsonl")
    run(make(), log, 1)
    with pytest.raises(ValueError, match="other settings; this trainer has optimizer_options="):
        log.replay(make(optimizer=functools.partial(torch.optim.Adam, betas=(0.5, 0.9))))


def test_a_line_holds_what_has_changed(tmp_path: Path) -> None:
    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), make()
    run(trainer, log, 1)
    trainer.group_size = 4
    run(trainer, log, 1)
    head, first, second = map(json.loads, log.path.read_text().splitlines())
    assert head["settings"]["group_size"] == 0
    assert first["settings"] == {} and second["settings"] == {"group_size": 4}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_show_in_the_record(name: str) -> None:
    trainer = make()
    before = trainer.settings()
    CHANGES[name](trainer)
    if name != "shaping, another function":
        assert trainer.settings() != before
        assert trainer.fingerprint() != make().fingerprint()
    assert trainer.state_dict()["settings"] == trainer.settings().plain()


def test_every_setting_is_of_some_trainer() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert set(make().settings().plain()) == names and set(FIXED) <= names
    given = make(population_size=24, chunk_size=12, noise_reuse=2, group_size=12, shaping="raw", noise="rademacher")
    given.coalesce, given.evaluation_dtype = False, torch.bfloat16
    expected = {"population_size": 24, "chunk_size": 12, "noise_reuse": 2, "group_size": 12, "shaping": "raw"}
    expected |= {"noise": "rademacher", "coalesce": False, "evaluation_dtype": "torch.bfloat16", "device": "cpu"}
    assert given.settings().plain().items() >= expected.items()


def test_a_callback_may_set_any_function() -> None:
    trainer, twin = make(), make()

    def callback(generation: int, history: list[float]) -> None:
        if generation == 1:
            trainer.shaping = lambda scores: 2 * scores

    trainer.train(2, verbose=False, callback=callback)
    twin.step()
    twin.shaping = lambda scores: 2 * scores
    twin.step()
    assert torch.equal(trainer.current_params, twin.current_params)


def test_names_of_shapers() -> None:
    assert shaper_name(zscore) == shaper_name("zscore") == "zscore"
    names = [shaper_name(f) for f in (halved, tempered(1.0), tempered(2.0), lambda s: s, lambda s: 2 * s)]
    names.append(shaper_name(functools.partial(halved)))
    assert len(set(names)) == len(names)
    assert shaper_name(tempered(1.0)) == shaper_name(tempered(1.0))


def test_an_engines_copy_follows(tmp_path: Path) -> None:
    for name, change in CHANGES.items():
        trainer, copied = make(model=network()), make(model=network())
        change(trainer)
        trainer.coalesce = False
        copied.set_working_state(trainer.working_state())
        ours, theirs = trainer.settings().plain(), copied.settings().plain()
        # Members are shaped where the step is made.
        del ours["shaping"], theirs["shaping"]
        assert ours == theirs, name
