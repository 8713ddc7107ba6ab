"""Noise is a function of its key alone; its distribution is what it is said to be."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from eggroll_trainer.noise import bits as random_bits
from eggroll_trainer.noise import keys as noise_module
from eggroll_trainer.noise.keys import Noise, NoiseKind, Stream, derive_seed, forked_rng, keyed_generator

KEY = {"generation": 3, "name": "layer.weight", "first": 5, "count": 40, "numel": 50}
KINDS: list[NoiseKind] = ["gaussian", "rademacher"]


def of_one(
    noise: Noise, generation: int, name: str, first: int, count: int, numel: int, kind: NoiseKind = "gaussian"
) -> torch.Tensor:
    """Draws of a single parameter."""
    return noise.draw(generation, first, count, [Stream(name, numel, kind)])[0]


def draw(seed: int = 1, kind: NoiseKind = "gaussian", **changes: object) -> torch.Tensor:
    return of_one(Noise(seed), **{**KEY, **changes}, kind=kind)  # type: ignore[arg-type]


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether normal numbers are equal by chance only."""
    # Two of them are with probability 2^-16: of 10,000 pairs 0.15 on average, and more than 5 with probability 2e-8.
    assert a.numel() <= 10_000
    return int((a == b).sum()) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_same_key_same_bits(kind: NoiseKind) -> None:
    assert torch.equal(draw(kind=kind), draw(kind=kind))


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"generation": 4}, {"name": "layer.bias"}, {"name": "layer2.weight"}],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_the_key_changes_every_value(change: dict[str, object]) -> None:
    assert differ(draw(), draw(**change))  # type: ignore[arg-type]
    # Of random signs about half change: n = 2000, so outside 0.5 ± 6/(2√n) with probability 2e-9.
    changed = (draw(kind="rademacher") != draw(kind="rademacher", **change)).double().mean()  # type: ignore[arg-type]
    assert abs(changed - 0.5) < 3 / math.sqrt(KEY["count"] * KEY["numel"])  # type: ignore[operator]


def test_members_differ() -> None:
    noise = draw(count=64)
    for shift in (1, 2, 7):
        assert differ(noise[shift:], noise[:-shift])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("numel", [1, 11, 2000])
def test_does_not_depend_on_how_members_are_cut(cut: int, numel: int, kind: NoiseKind) -> None:
    noise = Noise(7)
    whole = of_one(noise, 0, "w", 0, 600, numel, kind)
    parts = [of_one(noise, 0, "w", first, min(cut, 600 - first), numel, kind) for first in range(0, 600, cut)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(of_one(noise, 0, "w", 123, 5, numel, kind), whole[123:128])


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_depend_on_threads_nor_on_what_is_drawn_beside_it(
    kind: NoiseKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_bits, "_SHARED", 1000)
    monkeypatch.setattr(noise_module, "_GROUP_NUMBERS", 2**21)
    streams = [Stream(f"w{i}", numel, kind) for i, numel in enumerate((1, 7, 300, 5000))]
    alone = [of_one(Noise(7), 0, stream.name, 3, 600, stream.numel, kind) for stream in streams]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            together = Noise(7).draw(0, 3, 600, streams)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
            with torch.inference_mode():
                assert torch.equal(Noise(7).draw(0, 3, 600, streams)[3], alone[3])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_makes_the_same_numbers(kind: NoiseKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_bits, "_COMPILED", 1)
    streams = [Stream("a", 3, kind), Stream("b", 200, kind), Stream("c", 200_003, kind)]
    # Of one shape as well, for which the code is called without checks from the second time on.
    for generation, count in ((0, 600), (1, 600), (2, 600), (2, 3), (3, 3)):
        compiled = Noise(7, compile=True).draw(generation, 3, count, streams)
        assert all(map(torch.equal, compiled, Noise(7).draw(generation, 3, count, streams)))
    assert not random_bits._FAILED
    assert len(random_bits._compiled(getattr(random_bits, f"_{kind}"))._prepared) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_accelerators_make_the_same_numbers(kind: NoiseKind) -> None:
    device = torch.get_default_device()
    if device.type == "cpu":
        pytest.skip("needs EGGROLL_TEST_DEVICE")
    streams = [Stream("a", 3, kind), Stream("b", 201, kind)]
    there = Noise(7).draw(0, 3, 600, [stream._replace(device=device) for stream in streams])
    here = Noise(7).draw(0, 3, 600, streams)  # streams are on a CPU unless told otherwise
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_accelerators_run_is_right_on_a_cpu_as_well(kind: NoiseKind) -> None:
    starts, steps = np.random.default_rng(0).integers(2**64, size=(2, 33), dtype=np.uint64)
    expected, out = torch.empty(2, 33 * 256, device="cpu")
    random_bits._fill(expected, starts, steps, kind, compile=False)
    first, step = torch.from_numpy(starts.view(np.int64)), torch.from_numpy(steps.view(np.int64))
    if kind == "gaussian":
        random_bits._gaussian(first, step, random_bits._normal_quantiles(out.device), out)
    else:
        random_bits._rademacher(first, step, out)
    assert torch.equal(out, expected)


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*tensors: torch.Tensor) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(random_bits, "_COMPILED", 1)
    monkeypatch.setattr(random_bits, "_FAILED", set())
    monkeypatch.setattr(random_bits, "_compiled", lambda function: fails)
    streams = [Stream("a", 3), Stream("b", 200, "rademacher")]
    assert all(map(torch.equal, Noise(7, compile=True).draw(0, 3, 600, streams), Noise(7).draw(0, 3, 600, streams)))
    assert fails in random_bits._FAILED


def test_does_not_depend_on_what_was_drawn_before() -> None:
    noise = Noise(7)
    for name, generation in (("a", 0), ("b", 0), ("a", 1)):
        of_one(noise, generation, name, 3, 2, 5)
    assert torch.equal(of_one(noise, 0, "a", 3, 2, 5), of_one(Noise(7), 0, "a", 3, 2, 5))


def test_a_draw_of_a_large_parameter_can_be_had_by_itself() -> None:
    whole = of_one(Noise(7), 0, "w", 0, 5, 2**19 + 1)
    assert torch.equal(of_one(Noise(7), 0, "w", 3, 1, 2**19 + 1), whole[3:4])


def test_global_generators_are_untouched() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    draw()
    draw(kind="rademacher")
    with forked_rng(1, "a"):
        torch.randn(5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), repr(np.random.get_state()))


def test_forked_rng_is_a_function_of_its_key() -> None:
    def inside(*key: int | str) -> torch.Tensor:
        with forked_rng(*key):
            return torch.randn(100)

    assert torch.equal(inside(1, "a"), inside(1, "a"))
    assert not (inside(1, "a") == inside(2, "a")).any()
    assert not (inside(1, "a") == inside(1, "b")).any()


def test_all_64_bits_of_a_key_count() -> None:
    low, high = 5, 5 + 2**32
    assert differ(draw(seed=low), draw(seed=high))
    first, second = keyed_generator(low), keyed_generator(high)
    assert not (torch.randn(99, generator=first) == torch.randn(99, generator=second)).any()


def test_keys_are_serialised_injectively() -> None:
    keys: list[tuple[int | str, ...]] = [
        (1, 2),
        (12,),
        ("1", 2),
        (1, "2"),
        ("1", "2"),
        ("12",),
        (1, 2, ""),
        ("a", "b"),
        ("ab",),
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_words_are_those_of_the_generator() -> None:
    # Its definition in whole numbers; the last key's step is one that is replaced.
    for entropy in (bytes(range(16)), bytes(range(100, 116)), bytes(8) + bytes([255] * 8)):
        start, step = int.from_bytes(entropy[:8], "little"), int.from_bytes(entropy[8:], "little") | 1
        if bin(step ^ step >> 1).count("1") < 24:
            step ^= 0xAAAAAAAAAAAAAAAA
        expected = []
        for i in range(3, 80):
            z = (start + i * step) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            expected += [2.0 * (z >> bit & 1) - 1 for bit in range(64)]
        (signs,) = random_bits.random_numbers([random_bits.Part(entropy, 3 * 64, 80 * 64)], "rademacher")
        assert signs.tolist() == expected


def test_normal_numbers_are_the_quantiles_of_their_bits() -> None:
    part = random_bits.Part(bytes(range(16)), 0, 4000)
    (normal,), (signs,) = (
        random_bits.random_numbers([part], "gaussian"),
        random_bits.random_numbers([part._replace(stop=64_000)], "rademacher"),
    )
    bits = (signs.view(-1, 16) > 0).double()
    # The highest bit is the sign, as the two halves of the table are; the others tell the distance from zero.
    low = bits[:, :15] @ 2.0 ** torch.arange(15, dtype=torch.float64)
    expected = torch.special.ndtri(0.5 + (low + 0.5) / 2**16) * (1 - 2 * bits[:, 15])
    # Scaled to unit variance, by less than 1e-4.
    torch.testing.assert_close(normal.double(), expected, rtol=1e-4, atol=0)


def test_gaussian_is_gaussian() -> None:
    noise = of_one(Noise(11), 0, "w", 0, 1000, 100)
    # Kolmogorov-Smirnov over 1e5 values; fails for a right generator with probability 1e-6.
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    # Of 2^16 possible values, 1e5 draws miss 2^16·exp(-1e5/2^16) = 14,249, with a deviation below 120; 6 of them.
    assert abs(2**16 - len(noise.unique()) - 14_249) < 6 * 120


def test_rademacher_is_plus_minus_one() -> None:
    noise = of_one(Noise(11), 0, "w", 0, 1000, 101, "rademacher")
    assert set(noise.unique().tolist()) == {-1.0, 1.0}
    # The mean of n signs has deviation 1/√n; 6 of them: failure probability 2e-9.
    assert abs(noise.mean()) < 6 / math.sqrt(noise.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_uncorrelated(kind: NoiseKind) -> None:
    numel = 2000
    noise = torch.cat([of_one(Noise(3), g, name, 0, 70, numel, kind) for g in (0, 1) for name in ("a", "b")]).double()
    correlation = noise @ noise.T / numel
    pairs = correlation[~torch.eye(len(noise), dtype=torch.bool)]
    # Each entry has deviation 1/√numel; 39,060 distinct pairs at 6.5 deviations: failure probability 4e-6.
    assert pairs.abs().max() < 6.5 / math.sqrt(numel)
