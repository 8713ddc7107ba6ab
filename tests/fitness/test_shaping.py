"""Shaping: one contract for every shaper, and what each one promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import make, randn
from scipy import stats
from torch import Tensor

from eggroll_trainer import Population, batched
from eggroll_trainer.fitness.scores import check_scores
from eggroll_trainer.fitness.shaping import SHAPERS, antithetic_sign, centered_ranks, get_shaper, raw, shape, zscore


def scores(count: int = 12, ties: bool = False) -> Tensor:
    values = randn(count, dtype=torch.float64)
    return values.round() if ties else values


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", SHAPERS)
class TestEveryShaper:
    def test_keeps_shape_and_is_finite(self, name: str, ties: bool) -> None:
        weights = SHAPERS[name](scores(ties=ties))
        assert weights.shape == (12,) and weights.dtype == torch.float64 and weights.isfinite().all()

    def test_better_is_never_weighted_less(self, name: str, ties: bool) -> None:
        f = scores(ties=ties)
        weights = SHAPERS[name](f)
        pairs = (
            [(2 * k, 2 * k + 1) for k in range(6)]
            if name == "antithetic_sign"
            else [(i, j) for i in range(12) for j in range(12)]
        )
        for i, j in pairs:
            if f[i] > f[j]:
                assert weights[i] > weights[j]
            elif f[i] == f[j]:
                assert weights[i] == weights[j]

    def test_does_not_change_its_input(self, name: str, ties: bool) -> None:
        f = scores(ties=ties)
        SHAPERS[name](f)
        assert torch.equal(f, scores(ties=ties))

    def test_invariant_to_scale_and_shift(self, name: str, ties: bool) -> None:
        if name == "raw":
            pytest.skip("raw scores are what they are")
        f = scores(ties=ties)
        torch.testing.assert_close(SHAPERS[name](f), SHAPERS[name](1000 * f), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(SHAPERS[name](f), SHAPERS[name](f + 8), rtol=1e-9, atol=1e-9)

    def test_groups_are_shaped_on_their_own(self, name: str, ties: bool) -> None:
        f = scores(ties=ties)
        together = shape(f, SHAPERS[name], group_size=4)
        apart = torch.cat([SHAPERS[name](group) for group in f.view(3, 4)])
        torch.testing.assert_close(together, apart, rtol=1e-14, atol=1e-14)

    def test_equal_scores_give_no_direction(self, name: str, ties: bool) -> None:
        if name != "raw":
            assert not SHAPERS[name](torch.full((12,), 3.0, dtype=torch.float64)).any()


def test_zscore() -> None:
    weights = zscore(scores())
    assert abs(weights.mean()) < 1e-15 and abs(weights.square().mean() - 1) < 1e-14
    f = scores()
    torch.testing.assert_close(weights, (f - f.mean()) / f.std(correction=0))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_zscore_of_tiny_and_huge_scores(scale: float) -> None:
    torch.testing.assert_close(zscore(scale * scores()), zscore(scores()))


@pytest.mark.parametrize("ties", [False, True])
def test_centered_ranks_are_those_of_scipy(ties: bool) -> None:
    f = scores(40, ties)
    expected = (stats.rankdata(f.numpy()) - 1) / 39 - 0.5
    torch.testing.assert_close(centered_ranks(f), torch.from_numpy(expected))


def test_centered_ranks_of_one() -> None:
    assert centered_ranks(torch.tensor([3.0])).tolist() == [0.0]


def test_antithetic_sign() -> None:
    assert antithetic_sign(torch.tensor([1.0, 3.0, 5.0, 5.0, 9.0, 2.0])).tolist() == [-1, 1, 0, 0, 1, -1]


def test_raw() -> None:
    assert torch.equal(raw(scores()), scores())


def test_callables_get_each_group() -> None:
    seen = []

    def shaper(group: Tensor) -> Tensor:
        seen.append(group.clone())
        return group.float() * 2

    weights = shape(scores(), get_shaper(shaper, 0), group_size=6)
    assert torch.equal(torch.cat(seen), scores()) and len(seen) == 2
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, 2 * scores(), rtol=1e-6, atol=1e-6)


def test_scores_that_are_not_finite_count_as_the_worst() -> None:
    nan, inf = float("nan"), float("inf")
    checked = check_scores(torch.tensor([1.0, nan, -2.0, inf, 5.0, -inf, 5.0]).double(), generation=1)
    assert checked.values.tolist() == [1.0, -2.0, -2.0, -2.0, 5.0, -2.0, 5.0]
    assert checked.num_nonfinite == 3
    assert checked.num_tied == 6
    assert checked.best == 4


def test_scores_that_are_not_finite_count_as_the_worst_of_their_group() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([100.0, nan, 90.0, -5.0, inf, -7.0, nan, -inf, nan]).double()
    checked = check_scores(scores, generation=1, group_size=3)
    assert checked.values.tolist() == [100.0, 90.0, 90.0, -5.0, -7.0, -7.0, -7.0, -7.0, -7.0]
    assert checked.num_nonfinite == 5 and checked.best == 0
    # A group without a finite score says nothing about its members, and one of equal scores neither.
    assert shape(checked.values, zscore, 3).view(3, 3)[2].tolist() == [0, 0, 0]


def test_the_best_is_a_member_with_a_finite_score() -> None:
    for group_size in (0, 2):
        checked = check_scores(torch.tensor([float("nan"), 9.0]).double(), generation=1, group_size=group_size)
        assert checked.values.tolist() == [9.0, 9.0] and checked.best == 1


def test_a_group_with_a_crash_in_training() -> None:
    """What a crash costs its member depends on its own group only, which may be on another scale."""
    good = [-1.0, -2.0, -3.0, -4.0]

    def trained(crash: float, others: float) -> Tensor:
        values = torch.tensor([*good[:3], crash, *(others + x for x in good)]).double()

        @batched
        def fitness(population: Population) -> Tensor:
            return values

        trainer = make(fitness_fn=fitness, group_size=4)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "a fitness that is not finite counts as the worst finite one of its group"
            )
            trainer.step()
        return trainer.current_params

    expected = trained(-3.0, 0.0)
    for others in (0.0, 64.0, -64.0):
        assert torch.equal(trained(float("nan"), others), expected)
