"""Whole runs of members with a score for each of several tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NAN, POPULATION, Custom, X, Y, assert_same, goes_on, make, network
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.callbacks import ScoreLog
from eggroll_trainer.trainers.told import ToldScores

TASKS = 6
WORST = "counts as the worst finite one of its generation and task"


def tasks(model: nn.Module) -> Tensor:
    return -(model(X) - Y).square().mean(1).view(TASKS, 4).double().mean(1)


@batched
def tasks_at_once(population: Population) -> Tensor:
    return -(population(X) - Y).square().mean(2).view(-1, TASKS, 4).double().mean(2)


def run(**options: Any) -> Any:
    return make(**{"fitness_fn": tasks, "coalesce": False, **options})


KINDS: dict[str, dict[str, Any]] = {
    "low rank": {"noise_reuse": 2},
    "chunks": {"noise_reuse": 2, "chunk_size": 2},
    "groups": {"group_size": 4},
    "ranks": {"shaping": "centered_ranks"},
    "vanilla": {"cls": VanillaESTrainer},
    "custom": {"cls": Custom},
}


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer])
def test_the_step_is_that_of_the_definition(cls: type[ESTrainer], group_size: int) -> None:
    trainer = run(
        cls=cls, optimizer=None, group_size=group_size, model=network(torch.float64), fitness_fn=tasks_float64
    )
    population = trainer.ask()
    scores = torch.stack([tasks_float64(population.member(i)).detach() for i in range(POPULATION)])
    weights = []
    for group in scores.split(group_size or POPULATION):
        centred = group - group.mean(0)
        weights.append(centred.mean(1) / centred.square().mean().sqrt())
    perturbations = trainer.sample_perturbations(POPULATION)
    update = POPULATION**0.5 * (torch.cat(weights)[:, None] * perturbations).mean(0)
    expected = trainer.current_params + trainer.learning_rate * update
    metrics = trainer.step()
    torch.testing.assert_close(trainer.current_params, expected)
    means = scores.mean(1)
    assert metrics["mean_fitness"] == pytest.approx(means.mean().item(), rel=1e-12)
    assert metrics["fitness"] == metrics["best_fitness"] == pytest.approx(means.max().item(), rel=1e-12)
    assert metrics["std_fitness"] == pytest.approx(means.std(correction=0).item(), rel=1e-9)
    assert trainer.fitness_history == [metrics["mean_fitness"]]
    best = trainer.get_best_model()
    assert_same(best.state_dict(), population_member_state(trainer, int(means.argmax())))
    assert trainer.evaluate_fitness(best) == metrics["best_fitness"]


def tasks_float64(model: nn.Module) -> Tensor:
    return -(model(X.double()) - Y).square().mean(1).view(TASKS, 4).mean(1)


def population_member_state(trainer: Any, index: int) -> dict[str, Tensor]:
    twin = run(
        cls=type(trainer),
        optimizer=None,
        group_size=trainer.group_size,
        model=network(torch.float64),
        fitness_fn=tasks_float64,
    )
    return twin.ask().member(index).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_is_none(kind: str) -> None:
    @batched
    def none(population: Population) -> Tensor:
        return tasks_at_once(population).mean(1)

    @batched
    def one(population: Population) -> Tensor:
        return none(population)[:, None]

    goes_on(run(**KINDS[kind], fitness_fn=one), run(**KINDS[kind], fitness_fn=none))


@pytest.mark.parametrize("kind", KINDS)
def test_asking_and_telling_in_parts_is_step(kind: str, tmp_path: Path) -> None:
    asking, stepping = run(**KINDS[kind]), run(**KINDS[kind])
    for _ in range(2):
        population = asking.ask()
        scores = torch.stack([tasks(population.member(i)).detach() for i in range(POPULATION)])
        assert asking.tell(scores[5:7], members=[5, 6]) is None
        assert asking.tell(scores[:1] + 9, members=[0]) is None
        asking.save(tmp_path / "run.pt")
        asking = run(**KINDS[kind])
        asking.load(tmp_path / "run.pt")
        asking.ask()
        order = [7, 1, 0, 3, 2, 4]
        assert asking.tell(scores[order].tolist(), members=order) == stepping.step()
    goes_on(asking, stepping)
    assert_same(asking.get_best_model().state_dict(), stepping.get_best_model().state_dict())


def test_told_numbers_of_tasks_must_agree() -> None:
    trainer = run()
    trainer.ask()
    trainer.tell(torch.zeros(2, 3), members=[0, 1])
    with pytest.raises(ValueError, match="got 2 scores for each member, but other members have 3 scores each"):
        trainer.tell(torch.zeros(2, 2), members=[0, 2])
    with pytest.raises(ValueError, match="got a single score for each member, but other members have 3 scores each"):
        trainer.tell([NAN], members=[2])
    # Nothing of them was kept, and whoever is told of again is not among the others.
    assert trainer.tell(torch.ones(2, 2).cumsum(0), members=[0, 1]) is None
    assert trainer.tell(torch.randn(6, 2), members=range(2, 8)) is not None
    trainer.ask()
    trainer.tell(torch.zeros(1, 3), members=[4])
    assert trainer.tell(torch.randn(8, 5)) is not None, "the next generation may have other tasks"


def test_a_column_that_is_told_is_none() -> None:
    one, none = ToldScores(3, {}).with_scores([[1.0], [2.0]], [2, 0]), ToldScores(3, {}).with_scores([1.0, 2.0], [2, 0])
    assert_same(one.with_scores([3.0], [1]).state(), none.with_scores([[3.0]], [1]).state())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    trainer, twin = run(**KINDS[kind]), run(**KINDS[kind])
    trainer.train(2, verbose=False)
    twin.train(2, verbose=False)
    trainer.save(tmp_path / "run.pt")
    other = run(**KINDS[kind])
    other.load(tmp_path / "run.pt")
    goes_on(other, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_of_scores_is_the_run(kind: str, tmp_path: Path) -> None:
    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), run(**KINDS[kind], fitness_fn=failing(more_tasks(), 3))
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one"):
        for _ in range(4):
            log.begin(trainer)
            trainer.step()
            log.append(trainer)
    again = run(**KINDS[kind])
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one"):
        assert log.replay(again) == 4
    assert_same(again.state_dict(), trainer.state_dict())


def more_tasks() -> Iterator[int]:
    """The numbers of tasks of four generations."""
    return iter([2, 3, 6, 1])


def failing(numbers: Iterator[int], member: int) -> Any:
    """A function of the population that has other tasks in each generation, in the first of which a member fails."""
    generations: dict[int, int] = {}

    @batched
    def fitness(population: Population) -> Tensor:
        if population.generation not in generations:
            generations[population.generation] = next(numbers)
        scores = tasks_at_once(population)[:, : generations[population.generation]].clone()
        scores[[i == member for i in population.members], 0] = NAN
        return scores

    return fitness


def test_the_log_has_four_bytes_a_score(tmp_path: Path) -> None:
    def single(model: nn.Module) -> Tensor:
        return tasks(model).float()

    log, trainer = ScoreLog(tmp_path / "scores.jsonl"), run(fitness_fn=single)
    log.begin(trainer)
    trainer.step()
    log.append(trainer)
    (generation,) = log.generations()
    assert generation.scores.shape == (POPULATION, TASKS) and generation.scores.dtype == torch.float64
    assert torch.equal(generation.scores, trainer.last_generation.scores)
    line = log.path.read_text().splitlines()[1]
    assert '["<f4", "' in line and f"[{POPULATION}, {TASKS}]" in line


def test_tasks_that_fail() -> None:
    trainer, twin = run(), run()
    population = trainer.ask()
    twin.ask()
    scores = torch.stack([tasks(population.member(i)).detach() for i in range(POPULATION)])
    failed, worst = scores.clone(), scores.clone()
    failed[[1, 6], 2] = torch.tensor([NAN, torch.inf]).double()
    worst[[1, 6], 2] = scores[[0, 2, 3, 4, 5, 7], 2].min()
    with pytest.warns(RuntimeWarning, match=f"{WORST}, and a task without any is left out; see num_nonfinite"):
        metrics = trainer.tell(failed)
    assert {**metrics, "num_nonfinite": 0} == twin.tell(worst) and metrics["num_nonfinite"] == 2
    assert torch.equal(trainer.current_params, twin.current_params)


def test_a_task_that_fails_throughout_contributes_nothing() -> None:
    @batched
    def dead(population: Population) -> Tensor:
        return tasks_at_once(population).index_fill(1, torch.tensor([1, 4]), NAN)

    @batched
    def without(population: Population) -> Tensor:
        return tasks_at_once(population)[:, [0, 2, 3, 5]]

    trainer, twin = run(fitness_fn=dead), run(fitness_fn=without)
    with pytest.warns(RuntimeWarning, match="a task without any is left out"):
        metrics = trainer.step()
    assert {**metrics, "num_nonfinite": 0} == twin.step() and metrics["num_nonfinite"] == 2 * POPULATION
    assert torch.equal(trainer.current_params, twin.current_params)


def test_no_finite_score_at_all() -> None:
    trainer, twin = run(), run()
    trainer.fitness_fn = lambda model: tasks(model) * NAN
    with pytest.raises(ValueError, match="no member of generation 1 has a finite fitness"):
        trainer.step()
    trainer.fitness_fn = tasks
    goes_on(trainer, twin)


@pytest.mark.parametrize("coalesce", [True, False])
def test_members_must_have_the_same_tasks(coalesce: bool) -> None:
    counts = iter([6] * 5 + [4] * 100)

    def fitness(model: nn.Module) -> Tensor:
        return tasks(model)[: next(counts)]

    trainer, twin = run(coalesce="unchecked" if coalesce else False), run(coalesce="unchecked" if coalesce else False)
    trainer.fitness_fn = fitness
    expected = "returned 6 scores for member 0 and 4 scores for member 5: all members of a generation must be scored"
    with pytest.raises(ValueError, match=expected):
        trainer.step()
    trainer.fitness_fn = tasks
    goes_on(trainer, twin)


def test_chunks_must_have_the_same_tasks() -> None:
    @batched
    def fitness(population: Population) -> Tensor:
        return tasks_at_once(population)[:, : 3 if population.first < 4 else 2]

    trainer, twin = run(chunk_size=2), run(chunk_size=2)
    trainer.fitness_fn = fitness
    expected = (
        "in generation 1 the fitness function returned 3 scores for each of members 0-1 and 2 scores for each of"
        " members 4-5: all members of a generation must be scored on the same tasks"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.step()
    trainer.fitness_fn = tasks
    goes_on(trainer, twin)


def test_a_custom_trainer_gets_the_means() -> None:
    seen: list[Tensor] = []

    class Watching(Custom):
        def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
            seen.append(fitnesses)
            return super().compute_update(perturbations, fitnesses)

    trainer = run(cls=Watching)
    trainer.step()
    assert seen[0].shape == (POPULATION,) and seen[0].mean().item() == trainer.history["mean_fitness"][0]


def test_a_keyed_trainer_in_dense_form_takes_the_same_step() -> None:
    class Dense(VanillaESTrainer):
        def sample_perturbations(self, population_size: int) -> Tensor:
            return super().sample_perturbations(population_size)

    dense, keyed = run(cls=Dense, optimizer=None), run(cls=VanillaESTrainer, optimizer=None)
    dense.step()
    keyed.step()
    torch.testing.assert_close(dense.current_params, keyed.current_params)


def test_evaluate_fitness_is_the_mean() -> None:
    plain, at_once = run(), run(fitness_fn=tasks_at_once)
    expected = tasks(plain.model).mean().item()
    assert plain.evaluate_fitness(plain.model) == pytest.approx(expected, rel=1e-12)
    assert at_once.evaluate_fitness(at_once.model) == pytest.approx(expected, rel=1e-6)


def test_tasks_of_a_method_of_a_subclass() -> None:
    class Own(EGGROLLTrainer):
        def evaluate_fitness(self, model: nn.Module) -> Any:
            return tasks(model)

    own, plain = run(cls=Own, fitness_fn=lambda model: 0.0), run()
    assert own.step() == plain.step() and torch.equal(own.current_params, plain.current_params)
