"""Members with a score for each of several tasks: what is counted, what weights follow, and what is compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import INF, NAN, X, Y, make, randn
from scipy import stats
from torch import Tensor, nn

from eggroll_trainer import Population, batched
from eggroll_trainer.fitness.scores import check_scores, mean_over_tasks, to_score, to_scores
from eggroll_trainer.fitness.shaping import SHAPERS, Shaper, shape


def cubes(group: Tensor) -> Tensor:
    """A shaper of a user's, that is not linear."""
    return (group - group.mean()) ** 3


EVERY: dict[str, Shaper] = {**SHAPERS, "callable": cubes}


def table(members: int = 12, tasks: int = 5) -> Tensor:
    """Scores of tasks that differ in difficulty and in how much members differ in them."""
    scale, offset = torch.arange(1, tasks + 1), 100 * torch.arange(tasks)
    return randn(members, tasks, dtype=torch.float64) * scale + offset


# The weights.


def by_definition(scores: Tensor, group_size: int) -> np.ndarray[Any, Any]:
    """Centre each task over the group, average, and divide by the standard deviation of all that was centred."""
    weights = []
    for group in np.split(scores.numpy(), len(scores) // group_size):
        centred = np.stack([column - np.mean(column) for column in group.T])
        weights.append(centred.mean(0) / np.std(centred))
    return np.concatenate(weights)


@pytest.mark.parametrize("group_size", [0, 4, 6])
def test_zscores_are_those_of_the_definition(group_size: int) -> None:
    expected = torch.from_numpy(by_definition(table(), group_size or 12))
    torch.testing.assert_close(shape(table(), SHAPERS["zscore"], group_size), expected)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_zscores_of_tiny_and_huge_scores(scale: float) -> None:
    scores = randn(12, 5, dtype=torch.float64)
    torch.testing.assert_close(
        shape(scale * scores, SHAPERS["zscore"]), shape(scores, SHAPERS["zscore"]), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", EVERY)
class TestEveryShaper:
    @pytest.mark.parametrize("group_size", [0, 4])
    @pytest.mark.parametrize("ties", [False, True])
    def test_one_task_is_none(self, name: str, group_size: int, ties: bool) -> None:
        for scores in (randn(n, seed=n, dtype=torch.float64) for n in (4, 12, 100, 1000, 4096)):
            scores = scores.round() if ties else scores
            assert torch.equal(shape(scores[:, None], EVERY[name], group_size), shape(scores, EVERY[name], group_size))

    def test_groups_are_shaped_on_their_own(self, name: str) -> None:
        apart = torch.cat([shape(group, EVERY[name]) for group in table().split(4)])
        torch.testing.assert_close(shape(table(), EVERY[name], 4), apart, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("group_size", [0, 6])
    def test_tasks_are_shaped_one_by_one_and_averaged(self, name: str, group_size: int) -> None:
        if name == "zscore":
            pytest.skip("z-scores share one standard deviation")
        columns = torch.stack([shape(column, EVERY[name], group_size) for column in table().T])
        torch.testing.assert_close(shape(table(), EVERY[name], group_size), columns.mean(0), rtol=1e-13, atol=1e-13)

    def test_difficulty_does_not_count(self, name: str) -> None:
        if name == "raw":
            pytest.skip("raw scores are what they are")
        easier = table() + torch.tensor([0, 8.0, -64.0, 0, 32.0], dtype=torch.float64)
        torch.testing.assert_close(shape(table(), EVERY[name]), shape(easier, EVERY[name]), rtol=1e-9, atol=1e-9)

    def test_a_task_that_all_do_alike_changes_the_size_of_weights_alone(self, name: str) -> None:
        scores = table()
        scores[:, 2] = 0.1
        weights, others = shape(scores, EVERY[name]), shape(scores[:, [0, 1, 3, 4]], EVERY[name])
        ratio = (4 / 5) ** 0.5 if name == "zscore" else 4 / 5
        offset = 0.1 / 5 if name == "raw" else 0.0
        torch.testing.assert_close(weights, ratio * others + offset, rtol=1e-12, atol=1e-12)

    def test_does_not_change_its_input(self, name: str) -> None:
        scores = table()
        shape(scores, EVERY[name])
        assert torch.equal(scores, table())

    def test_equal_scores_give_no_direction(self, name: str) -> None:
        if name != "raw":
            assert not shape(torch.tensor([[3.0, 0.1, 0.7]]).double().expand(12, 3), EVERY[name]).any()


def test_ranks_are_those_within_a_task() -> None:
    ranks = (stats.rankdata(table().numpy(), axis=0) - 1) / 11 - 0.5
    torch.testing.assert_close(shape(table(), SHAPERS["centered_ranks"]), torch.from_numpy(ranks.mean(1)))


def test_callables_get_each_task_of_each_group() -> None:
    seen = []

    def shaper(group: Tensor) -> Tensor:
        seen.append(group.clone())
        return group * 0

    shape(table(), shaper, group_size=6)
    expected = [group[:, k] for group in table().split(6) for k in range(5)]
    assert len(seen) == 10 and all(map(torch.equal, seen, expected))


def test_what_a_callable_returns_for_a_task_is_checked() -> None:
    with pytest.raises(ValueError, match="shaping must return a tensor of 6 finite weights, got Tensor|tensor"):
        shape(table(), lambda group: group[:2], group_size=6)


# Scores that are not finite.


def test_scores_that_are_not_finite_count_as_the_worst_of_their_task() -> None:
    checked = check_scores(torch.tensor([[1.0, NAN], [-INF, 20.0], [3.0, 10.0], [INF, 40.0]]).double(), generation=1)
    assert checked.values.tolist() == [[1, 10], [1, 20], [3, 10], [1, 40]]
    assert checked.means.tolist() == [5.5, 10.5, 6.5, 20.5]
    assert checked.num_nonfinite == 3 and checked.num_tied == 0 and checked.best == 3


def test_and_of_their_group() -> None:
    scores = torch.tensor([[1, NAN], [2, NAN], [NAN, 30], [4, 40], [5, 50], [6, NAN]]).double()
    checked = check_scores(scores, generation=1, group_size=2)
    # In the first group nobody has a score for the second task: all get the worst of the generation.
    assert checked.values.tolist() == [[1, 30], [2, 30], [4, 30], [4, 40], [5, 50], [6, 50]]
    assert checked.num_nonfinite == 4


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("group_size", [0, 4])
def test_a_task_without_a_finite_score_is_left_out(name: str, group_size: int) -> None:
    scores = table()
    scores[3, 1] = NAN
    dead = scores.clone()
    dead[:, 2] = NAN
    checked = check_scores(dead, generation=1, group_size=group_size)
    expected = check_scores(scores[:, [0, 1, 3, 4]], generation=1, group_size=group_size)
    assert torch.equal(checked.values, expected.values) and torch.equal(checked.means, expected.means)
    assert checked.best == expected.best and checked.num_nonfinite == 13
    weights = shape(checked.values, EVERY[name], group_size)
    assert torch.equal(weights, shape(expected.values, EVERY[name], group_size))


def test_a_group_in_which_a_task_failed_throughout_learns_from_the_others() -> None:
    scores = table()
    scores[4:8, 3] = NAN
    weights = shape(check_scores(scores, generation=1, group_size=4).values, SHAPERS["zscore"], 4)
    others = shape(scores[4:8][:, [0, 1, 2, 4]], SHAPERS["zscore"])
    torch.testing.assert_close(weights[4:8], (4 / 5) ** 0.5 * others)
    torch.testing.assert_close(weights[:4], shape(scores[:4], SHAPERS["zscore"]))


def test_the_best_has_failed_least_among_equals() -> None:
    scores = torch.tensor([[NAN, NAN], [NAN, 5.0], [5.0, 5.0], [5.0, 5.0]]).double()
    checked = check_scores(scores, generation=1)
    assert checked.means.tolist() == [5.0] * 4 and checked.best == 2 and checked.num_tied == 4


def test_no_finite_score_at_all() -> None:
    with pytest.raises(ValueError, match=r"no member of generation 3 has a finite fitness \(NaN or inf from all 4\)"):
        check_scores(torch.full((4, 3), NAN, dtype=torch.float64), generation=3)


@pytest.mark.parametrize("group_size", [0, 3])
def test_one_task_is_counted_as_none(group_size: int) -> None:
    scores = torch.tensor([1.0, NAN, 2.0, 2.0, INF, -1.0]).double()
    one = check_scores(scores[:, None], generation=1, group_size=group_size)
    none = check_scores(scores, generation=1, group_size=group_size)
    assert torch.equal(one.values[:, 0], none.values) and torch.equal(one.means, none.means)
    assert (one.num_nonfinite, one.num_tied, one.best) == (none.num_nonfinite, none.num_tied, none.best)


def test_means_of_huge_scores() -> None:
    assert mean_over_tasks((1.7e308, 1.7e308)) == 1.7e308
    assert mean_over_tasks(3.5) == 3.5


# What fitness functions return.


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.5, 2.0, -1.0], requires_grad=True),
        torch.tensor([0.5, 2.0, -1.0], dtype=torch.bfloat16),
        np.array([0.5, 2.0, -1.0], np.float32),
        np.array([0.5, 2, -1], object),
    ],
)
def test_a_score_for_each_task(value: Any) -> None:
    assert to_score(value) == (0.5, 2.0, -1.0)


def test_booleans_and_integers_of_tasks() -> None:
    assert to_score(torch.tensor([True, False])) == (1.0, 0.0) and to_score(np.arange(3)) == (0.0, 1.0, 2.0)


def test_single_numbers_stay_single() -> None:
    assert to_score(torch.tensor(0.5)) == 0.5 and to_score(np.float32(0.5)) == 0.5 and to_score(0.5) == 0.5


def test_tables_of_batched_functions() -> None:
    assert to_scores([[1, 2], [3, 4], [5, 0.1]], 3).tolist() == [[1, 2], [3, 4], [5, 0.1]], "digits are kept"
    assert to_scores(torch.ones(3, 1), 3).shape == (3,), "one column is the same as none"


# The check.


def task_scores(model: nn.Module) -> Tensor:
    return -(model(X) - Y).square().mean(1).view(6, 4).mean(1)


def messages(trainer: Any, generations: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(generations, verbose=False)
    return [str(warning.message) for warning in caught]


def sharing(wrong: Callable[[int], Any]) -> Callable[[nn.Module], Any]:
    """A function that counts its calls from one that calls the model to the next, which members do in turn."""
    calls = [0]

    def fitness(model: nn.Module) -> Any:
        calls[0] = 0
        scores = task_scores(model).detach()
        calls[0] += 1
        return wrong(calls[0])(scores)

    return fitness


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda count: lambda s: s + 1e-7 * (torch.arange(6) == 4) * (count - 1), "in task 4, and -"),
        (lambda count: lambda s: s * torch.where(torch.arange(6) < 5, 1.0, NAN if count > 1 else 1.0), "nan in task 5"),
        (lambda count: lambda s: s if count == 1 else s[:5], "earned 5 scores, and 6 scores when"),
        (lambda count: lambda s: s if count == 1 else s.mean(), "earned a single score, and 6 scores when"),
    ],
    ids=["one number", "NaN", "fewer", "one"],
)
def test_every_score_is_compared(wrong: Callable[[int], Any], text: str) -> None:
    trainer, twin = make(fitness_fn=sharing(wrong)), make(fitness_fn=task_scores, coalesce=False)
    said = messages(trainer, 2)
    assert len(said) == 1 and text in said[0] and "when it is evaluated alone, from the same outputs" in said[0]
    twin.train(2, verbose=False)
    assert torch.equal(trainer.current_params, twin.current_params)


def test_nan_is_what_nan_is() -> None:
    def fitness(model: nn.Module) -> Tensor:
        return task_scores(model) * torch.tensor([1, 1, NAN, 1, 1, 1])

    trainer = make(fitness_fn=fitness)
    said = messages(trainer, 2)
    assert (
        len(said) == 1 and "worst finite one of its generation and task, and a task without any is left out" in said[0]
    )
    assert trainer._findings.alone is None and trainer.history["num_nonfinite"] == [8, 8]


def test_a_plain_function_and_a_batched_one_give_the_same() -> None:
    @batched
    def at_once(population: Population) -> Tensor:
        return -(population(X) - Y).square().mean(2).view(-1, 6, 4).mean(2)

    plain, other = make(fitness_fn=task_scores), make(fitness_fn=at_once)
    plain.train(3, verbose=False)
    other.train(3, verbose=False)
    torch.testing.assert_close(plain.current_params, other.current_params)
    assert plain.history["mean_fitness"] == pytest.approx(other.history["mean_fitness"], rel=1e-6)
