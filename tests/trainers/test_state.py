"""State: a run that is stopped, saved, loaded or reset goes on as if nothing had happened."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Custom,
    assert_same,
    global_generator_untouched,
    make,
    network,
    population_fitness,
    regression,
    start_python,
)
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer

GENERATIONS = 5


def bf16(**options: Any) -> ESTrainer:
    return make(model=network(torch.bfloat16), fitness_fn=regression(torch.bfloat16), **options)


def groups() -> ESTrainer:
    model = network()
    first, last = model[0].parameters(), model[3].parameters()
    return make(model=model, params=[{"params": first, "lr": 0.3, "sigma": 0.05, "rank": 2}, {"params": last}])


def dropout() -> ESTrainer:
    return make(model=network(dropout=0.3).train())


def another_every_time() -> ESTrainer:
    """A trainer of which the frozen parameters and buffers are random, from the system."""
    noise = np.random.default_rng()
    model = network()
    model.append(nn.BatchNorm1d(2)).eval()
    with torch.no_grad():
        for value in (*model.buffers(), *(p for p in model.parameters() if p.ndim == 1)):
            value.copy_(torch.tensor(noise.uniform(0.5, 1.5, value.shape)))
    return make(model=model, freeze_nonlora=True)


# Each makes the trainer of a run anew, as a script does that is started again.
RUNS: dict[str, Callable[[], ESTrainer]] = {
    "plain": functools.partial(make, optimizer=None),
    "batched": functools.partial(make, fitness_fn=population_fitness),
    "one by one": functools.partial(make, coalesce=False),
    "vanilla": functools.partial(make, VanillaESTrainer),
    "custom": functools.partial(make, Custom, learning_rate=1.0, optimizer=None),
    "custom adam": functools.partial(make, Custom),
    "schedules": functools.partial(
        make,
        lr_scheduler=functools.partial(CosineAnnealingLR, T_max=GENERATIONS),
        sigma_scheduler=functools.partial(ExponentialLR, gamma=0.8),
    ),
    "adamw": functools.partial(make, optimizer=functools.partial(torch.optim.AdamW, weight_decay=0.1)),
    "anchored": functools.partial(make, optimizer=None, anchor_decay=0.5),
    "clipped": functools.partial(make, optimizer=None, shaping="raw", max_grad_norm=0.01),
    "momentum": functools.partial(make, optimizer=functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    "bf16": lambda: bf16(optimizer=None, learning_rate=0.01),
    "bf16 adam": lambda: bf16(),
    "groups": groups,
    "pairs": functools.partial(make, noise_reuse=2),
    "score groups": functools.partial(make, group_size=4, shaping="centered_ranks"),
    "chunks": functools.partial(make, chunk_size=5),
    "rademacher": functools.partial(make, noise="rademacher", rank=2),
    "dropout": dropout,
    "another every time": another_every_time,
}


def resume(folder: str) -> None:
    """Run in a process of its own: go on from every checkpoint in the folder to the last generation."""
    for path in sorted(Path(folder).glob("*.checkpoint")):
        trainer = RUNS[path.name.partition("@")[0]]()
        trainer.load(path)
        while trainer.generation < GENERATIONS:
            trainer.step()
        torch.save(trainer.state_dict(), path.with_suffix(".resumed"))


def test_resumed_in_a_new_process_at_any_generation(tmp_path: Path) -> None:
    final = {}
    for name, run in RUNS.items():
        trainer = run()
        for generation in range(GENERATIONS):
            trainer.save(tmp_path / f"{name}@{generation}.checkpoint")
            trainer.step()
        final[name] = trainer.state_dict()
    with start_python("test_state.resume", tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    for name, state in final.items():
        for generation in range(GENERATIONS):
            resumed = torch.load(tmp_path / f"{name}@{generation}.resumed", weights_only=True)
            assert_same(resumed, state, f"{name}, resumed at {generation}: ")


@pytest.mark.parametrize("name", RUNS)
class TestEveryRun:
    def test_state_dict_is_a_snapshot(self, name: str) -> None:
        trainer = RUNS[name]()
        trainer.train(2, verbose=False)
        state = trainer.state_dict()
        kept = copy.deepcopy(state)
        trainer.train(2, verbose=False)
        assert_same(state, kept)
        # Nor does loading tie them together.
        later = trainer.state_dict()
        trainer.load_state_dict(state)
        trainer.train(2, verbose=False)
        assert_same(state, kept)
        assert_same(trainer.state_dict(), later)

    def test_load_state_dict_restores_everything(self, name: str) -> None:
        trainer, other = RUNS[name](), RUNS[name]()
        other.seed = 77
        other.train(1, verbose=False)
        trainer.train(3, verbose=False)
        other.load_state_dict(trainer.state_dict())
        assert other.history == trainer.history and other.generation == 3 and other.seed == 1
        # What draws random numbers is evaluated again before it counts.
        assert trainer._findings.differs == other._findings.differs == (name == "dropout")
        best = trainer.best_fitness if name == "dropout" else max(trainer.history["fitness"])
        assert other.best_fitness == trainer.best_fitness == best
        assert torch.equal(other.initial_params, trainer.initial_params)
        assert_same(other.get_best_model().state_dict(), trainer.get_best_model().state_dict())
        assert_same(other.model.state_dict(), trainer.model.state_dict())

    def test_reset_replays(self, name: str) -> None:
        trainer = RUNS[name]()
        start = trainer.state_dict()
        trainer.train(3, verbose=False)
        first = trainer.state_dict()
        trainer.reset()
        assert_same(trainer.state_dict(), start)
        assert trainer.generation == 0 and trainer.best_fitness == float("-inf") and not trainer.history["fitness"]
        trainer.train(3, verbose=False)
        assert_same(trainer.state_dict(), first)

    def test_torchs_global_generator_is_untouched(self, name: str, tmp_path: Path) -> None:
        with global_generator_untouched():
            trainer = RUNS[name]()
            trainer.step()
            trainer.train(1, verbose=False)
            trainer.save(tmp_path / "run.pt")
            trainer.load(tmp_path / "run.pt")
            trainer.get_best_model()
            trainer.reset()
            trainer.step()
            trainer.seed = 5
            trainer.step()


def test_loading_undoes_what_was_changed_since() -> None:
    trainer = make()
    trainer.step()
    state, twin = trainer.state_dict(), make()
    twin.load_state_dict(state)
    trainer.learning_rate, trainer.sigma, trainer.rank, trainer.seed = 9.0, 9.0, 2, 9
    trainer.history.clear()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.zero_()
    trainer.load_state_dict(state)
    assert trainer.step() == twin.step()
    assert_same(trainer.state_dict(), twin.state_dict())


def test_a_checkpoint_of_a_reset_run_is_one_of_its_start(tmp_path: Path) -> None:
    trainer, twin = RUNS["schedules"](), RUNS["schedules"]()
    trainer.train(2, verbose=False)
    trainer.reset()
    trainer.save(tmp_path / "run.pt")
    twin.load(tmp_path / "run.pt")
    twin.train(2, verbose=False)
    fresh = RUNS["schedules"]()
    fresh.train(2, verbose=False)
    assert_same(twin.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("name", ["plain", "one by one", "vanilla", "custom", "pairs", "chunks", "bf16"])
def test_best_model_is_the_member_that_earned_the_score(name: str) -> None:
    """Its weights are those the member was evaluated with, to the bit, in whatever order members were run."""
    trainer = RUNS[name]()
    trainer.coalesce = False
    inner, seen = trainer.fitness_fn, []

    def watching(model: nn.Module) -> float:
        score = inner(model)
        seen.append((score, [p.detach().clone() for p in model.parameters()]))
        return score

    trainer.fitness_fn = watching
    trainer.train(4, verbose=False)
    score, weights = max(seen, key=lambda entry: entry[0])
    best = trainer.get_best_model()
    assert score == trainer.best_fitness == max(trainer.history["fitness"])
    assert_same([p.detach() for p in best.parameters()], weights)


def test_best_model_scores_what_history_says() -> None:
    double = regression(torch.float64)
    for cls in (EGGROLLTrainer, VanillaESTrainer, Custom):
        trainer = make(cls, model=network(torch.float64), fitness_fn=double)
        for _ in range(4):
            trainer.step()
            best = trainer.get_best_model()
            # The same weights, multiplied in another order: a handful of roundings of 1e-16.
            assert double(best) == pytest.approx(max(trainer.history["fitness"]), rel=1e-13)
        assert best is not trainer.model and best is not trainer.get_best_model()
        assert not {p.data_ptr() for p in best.parameters()} & {p.data_ptr() for p in trainer.model.parameters()}
        before = trainer.state_dict()
        nn.init.zeros_(best[0].weight)
        assert_same(trainer.state_dict(), before)
    untrained = make()
    assert_same(untrained.get_best_model().state_dict(), untrained.model.state_dict())


def test_fitness_history_is_what_callbacks_get() -> None:
    trainer, seen = make(), []
    assert trainer.fitness_history == []
    result = trainer.train(3, verbose=False, callback=lambda generation, history: seen.append(history))
    assert trainer.fitness_history == seen[-1] == result["fitness_history"] == trainer.history["mean_fitness"]
    trainer.fitness_history.clear()
    assert len(trainer.fitness_history) == 3
    trainer.reset()
    assert trainer.fitness_history == []


# Schedules.

Factory = Callable[[Any], LRScheduler]

SCHEDULES: dict[str, Factory] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda g: 1 / (1 + g)),
    "LambdaLR of NumPy": lambda o: schedulers.LambdaLR(o, lambda g: np.cos(g / 10)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda g: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3, 3]),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, eta_min=0.01),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=12, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, 9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(
        o, "max", patience=0, threshold=0.2, threshold_mode="abs", factor=0.5
    ),
}


def step_scheduler(scheduler: Any, metrics: dict[str, Any]) -> None:
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(metrics["mean_fitness"])
    else:
        scheduler.step()


@pytest.mark.parametrize("argument, setting", [("lr_scheduler", "learning_rate"), ("sigma_scheduler", "sigma")])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, argument: str, setting: str, tmp_path: Path) -> None:
    """Each gives the values it gives an ordinary optimizer, and goes on from a checkpoint."""
    options: dict[str, Any] = {argument: SCHEDULES[name]}
    trainer, twin = make(**options), make(**options)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = SCHEDULES[name](optimizer)
    for generation in range(6):
        value = getattr(trainer, setting)
        assert value == optimizer.param_groups[0]["lr"]
        metrics = trainer.step()
        assert metrics[setting] == value
        optimizer.step()
        step_scheduler(scheduler, metrics)
        if generation == 2:
            trainer.save(tmp_path / "run.pt")
    assert len(set(trainer.history[setting])) > 1
    twin.load(tmp_path / "run.pt")
    twin.train(3, verbose=False)
    assert_same(twin.state_dict(), trainer.state_dict())
    trainer.reset()
    assert_same(trainer.state_dict(), make(**options).state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_schedulers_that_users_make_are_saved_beside(name: str, scheduler_first: bool, tmp_path: Path) -> None:
    def go_on(trainer: ESTrainer, scheduler: Any) -> None:
        for _ in range(3):
            step_scheduler(scheduler, trainer.step())

    trainer, again = make(), make()
    scheduler = SCHEDULES[name](trainer)
    go_on(trainer, scheduler)
    trainer.save(tmp_path / "run.pt")
    beside = copy.deepcopy(scheduler.state_dict())
    if scheduler_first:
        scheduler_again = SCHEDULES[name](again)
        again.load(tmp_path / "run.pt")
    else:
        again.load(tmp_path / "run.pt")
        at = again.learning_rate
        scheduler_again = SCHEDULES[name](again)
        # torch's schedulers begin with the first value of their own: it is put back, as for any optimizer.
        again.learning_rate = at
    scheduler_again.load_state_dict(beside)
    go_on(trainer, scheduler)
    go_on(again, scheduler_again)
    assert_same(again.state_dict(), trainer.state_dict())


def test_reset_forgets_what_schedulers_left_in_the_groups() -> None:
    trainer = make()
    schedulers.OneCycleLR(trainer, 0.3, total_steps=12, cycle_momentum=False)
    trainer.reset()
    assert_same(trainer.state_dict(), make().state_dict())


def test_settings_are_live_both_ways() -> None:
    trainer = groups()
    # The attributes are those of the first group, and setting them sets all.
    assert (trainer.learning_rate, trainer.sigma, trainer.rank) == (0.3, 0.05, 2)  # type: ignore[attr-defined]
    assert [g["lr"] for g in trainer.param_groups] == [0.3, 0.1]
    trainer.param_groups[0].update(lr=0.4, sigma=0.2, rank=1)
    assert (trainer.learning_rate, trainer.sigma, trainer.rank) == (0.4, 0.2, 1)  # type: ignore[attr-defined]
    trainer.learning_rate, trainer.sigma, trainer.rank = 0.01, 0.3, 2  # type: ignore[attr-defined]
    assert [(g["lr"], g["sigma"], g["rank"]) for g in trainer.param_groups] == [(0.01, 0.3, 2)] * 2
    metrics = trainer.step()
    assert metrics["learning_rate"] == 0.01 and metrics["sigma"] == 0.3
    # A trainer that was made so does the same.
    same = make(learning_rate=0.01, sigma=0.3, rank=2)
    assert torch.equal(same.current_params, trainer.initial_params)
    same.step()
    assert torch.equal(same.current_params, trainer.current_params)
    # Options of groups act on their parameters alone.
    trainer.param_groups[0]["lr"] = 0.0
    first = [p.detach().clone() for p in trainer.param_groups[0]["params"]]
    last = [p.detach().clone() for p in trainer.param_groups[1]["params"]]
    trainer.step()
    assert all(map(torch.equal, trainer.param_groups[0]["params"], first))
    assert not any(map(torch.equal, trainer.param_groups[1]["params"], last))


def test_sigma_may_be_set_while_it_is_scheduled() -> None:
    trainer = make(sigma_scheduler=functools.partial(ExponentialLR, gamma=0.5))
    trainer.step()
    assert trainer.sigma == 0.05
    trainer.sigma = 0.4
    trainer.step()
    assert trainer.sigma == 0.2


def test_seed_may_be_set() -> None:
    trainer, other = make(), make(seed=5)
    for t in (trainer, other):
        t.step()
    trainer.load_state_dict({**other.state_dict(), "seed": 1})
    trainer.seed = 5
    assert trainer.step() == other.step()
