"""Running statistics: of all observations together, however they come."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gymnasium")

from eggroll_trainer.rl.normalization import ObservationNormalizer, Statistics, statistics_of

X = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 1e-3]) + 1000


def test_merged_in_pieces_is_the_same_as_at_once() -> None:
    whole, pieces = ObservationNormalizer(3), ObservationNormalizer(3)
    whole.merge([statistics_of(X)])
    for part in X.split([1, 0, 499, 500]):
        pieces.merge([statistics_of(part)])
    torch.testing.assert_close(pieces.mean, X.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces.squares / 1000, X.double().var(0, correction=0), rtol=1e-9, atol=0)
    bits = Statistics(X[0].numpy())
    for part in X.split(30):
        bits.add(part.numpy())
    torch.testing.assert_close(bits.as_tensor(), statistics_of(X), rtol=1e-9, atol=0)
    assert torch.equal(whole.count, pieces.count)


def test_forward_normalises_and_clips() -> None:
    normalizer = ObservationNormalizer(3, clip=2.0)
    assert torch.equal(normalizer(X[:5]), X[:5].clamp(-2, 2))
    normalizer.merge([statistics_of(X)])
    y = normalizer(X)
    expected = ((X.double() - X.double().mean(0)) / X.double().std(0, correction=0)).clamp(-2, 2)
    # The third column varies by a millionth of its mean, and float32 holds seven digits.
    torch.testing.assert_close(y[:, :2].double(), expected[:, :2], rtol=0, atol=2e-3)
    assert y.abs().max() == 2


def test_what_never_changes_is_only_shifted() -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.merge([statistics_of(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))])
    assert torch.equal(normalizer(torch.tensor([[6.0, 3.0]])), torch.tensor([[1.0, 1.0]]))


def test_it_is_part_of_the_state() -> None:
    normalizer, other = ObservationNormalizer(3), ObservationNormalizer(3)
    normalizer.merge([statistics_of(X)])
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other(X), normalizer(X))


@pytest.mark.parametrize("numbers", [1, 2, 4])
def test_observations_of_another_size_are_not_repeated_to_fit(numbers: int) -> None:
    with pytest.raises(ValueError, match=f"expected observations of 3 numbers, got {numbers}"):
        ObservationNormalizer(3)(torch.zeros(2, numbers))
