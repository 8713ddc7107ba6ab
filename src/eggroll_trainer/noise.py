"""Random streams: noise is a pure function of (seed, generation, parameter name, member).

Nothing is stored across a generation and torch's global generator is never touched: whoever needs the noise of some
members again asks for it by the same key and gets the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

NoiseKind = Literal["gaussian", "rademacher"]

# Draws of one parameter come in blocks, one random stream each, whatever part of them is asked for: so a draw does not
# depend on how a population is cut into chunks. Opening a stream takes as long as 16,000 numbers, so that a block has
# many more of them, but small chunks should not draw much that others need.
_BLOCK_NUMBERS = 2**16
_BLOCK_NUMBERS_AT_MOST = 2**20
_BLOCK_DRAWS = 64
_BLOCK_DRAWS_AT_MOST = 512

# So many numbers are worth a second thread: for less it would find its core taken by torch's own, which look out for
# new work for some milliseconds after they have finished.
_SHARED = 2**22

# torch's CPU generator is a Mersenne Twister, whose `manual_seed` keeps only 32 bits of a seed: of a hundred thousand
# streams some would be the same. The whole state is set instead; its serialised form is a header, 624 words in 64-bit
# slots, and the cache of an unfinished normal pair.
_WORDS = 624
_STATE_HEADER = 24

# On a CPU, normal numbers are quantiles of 16 random bits, |z| < 4.4; elsewhere they come from uniform ones of at most
# 53 random bits, by Box and Muller: |z| ≤ √(2·53·ln 2) < 9.
LARGEST_NORMAL = 9.0


def check_noise_kind(kind: object) -> NoiseKind:
    """Return ``kind`` if it names a distribution of low-rank factors, else raise ``ValueError``."""
    if kind not in get_args(NoiseKind):
        raise ValueError(f"noise must be one of {', '.join(map(repr, get_args(NoiseKind)))}, got {kind!r}")
    return kind  # type: ignore[return-value]


def _key_bytes(*key: int | str) -> bytes:
    """Serialise a key injectively: two different keys never share their bytes."""
    return b"".join(
        b"%c%d:%s" % (b"is"[isinstance(part, str)], len(text), text) for part in key for text in [str(part).encode()]
    )


def derive_seed(*key: int | str) -> int:
    """Return a 64-bit seed that is a hash of the whole ``key``."""
    return _hash(8, *key)


def _hash(size: int, *key: int | str) -> int:
    """Return a hash of the whole ``key``, of ``size`` bytes."""
    return int.from_bytes(hashlib.blake2b(_key_bytes(*key), digest_size=size).digest(), "little")


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of ``key`` alone.

    Args:
        key: Integers and strings; changing any of them changes the whole stream.
        device: Where the generator draws. Streams of different device types differ.
    """
    device = torch.device(device)
    generator = torch.Generator(device)
    if device.type != "cpu":
        # Accelerators use counter-based generators, which take all 64 bits.
        generator.manual_seed(derive_seed(*key))
        return generator
    state = _fresh_cpu_state().copy()
    slots = state[_STATE_HEADER : _STATE_HEADER + 8 * _WORDS].view(np.uint64)
    slots[:] = np.frombuffer(hashlib.shake_128(_key_bytes(*key)).digest(4 * _WORDS), np.uint32)
    generator.set_state(torch.from_numpy(state))
    return generator


@functools.cache
def _fresh_cpu_state() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return torch.Generator().manual_seed(0).get_state().numpy()


@contextlib.contextmanager
def forked_rng(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators from ``key`` inside the block, and put them back after it.

    Dropout and the samplers of custom trainers draw from the global generator; this makes them functions of the
    trainer's seed without the caller's own stream moving.
    """
    device = torch.device(device)
    accelerated = device.type != "cpu"
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else "cuda"):
        torch.set_rng_state(keyed_generator(*key).get_state())
        if accelerated:
            state = keyed_generator(*key, device=device).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield


class Stream(NamedTuple):
    """The random numbers of one parameter.

    Attributes:
        name: Name of the parameter in its model.
        numel: Random numbers in one draw.
        kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
        device: Where the noise is generated and returned.
    """

    name: str
    numel: int
    kind: NoiseKind = "gaussian"
    device: torch.device | str = "cpu"

    @property
    def block(self) -> int:
        """Return how many draws a block has."""
        size = min(max(_BLOCK_NUMBERS // max(1, self.numel), _BLOCK_DRAWS), _BLOCK_DRAWS_AT_MOST)
        return max(1, min(size, _BLOCK_NUMBERS_AT_MOST // max(1, self.numel)))


class Noise:
    """Independent draws of zero mean and unit variance for the parameters of a model.

    Args:
        seed: Seed of the run.

    Example:
        >>> noise = Noise(seed=0)
        >>> stream = Stream("fc.weight", numel=7)
        >>> (block,) = noise.draw(generation=3, first=10, count=4, streams=[stream])
        >>> (again,) = noise.draw(generation=3, first=12, count=1, streams=[stream])
        >>> torch.equal(block[2:3], again)
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # The last block of each parameter that was used in part: chunks smaller than a block come back for the rest.
        self._partial: dict[str, tuple[tuple[int | str, ...], Tensor]] = {}

    def draw(self, generation: int, first: int, count: int, streams: Sequence[Stream]) -> list[Tensor]:
        """Return draws ``first, …, first + count - 1`` of each stream, ``[count, numel]`` in float32.

        Args:
            generation: Index of the generation.
            first: Index of the first draw. A draw serves one member, or several if noise is reused.
            count: How many consecutive draws.
            streams: Whose numbers are drawn.
        """
        outputs: list[Tensor] = []
        fills: list[_Fill] = []
        parts: list[tuple[Tensor, Tensor]] = []
        partial = {}
        for stream in streams:
            out = torch.empty(count, stream.numel, dtype=torch.float32, device=stream.device)
            outputs.append(out)
            if out.numel() == 0:
                continue
            size = stream.block
            for block in range(first // size, (first + count - 1) // size + 1):
                start = block * size
                low, high = max(first, start), min(first + count, start + size)
                rows = out[low - first : high - first]
                key = (self.seed, generation, stream.name, block, stream.numel, stream.kind)
                if high - low == size:
                    fills.append(_Fill(rows, key, stream.kind))
                    continue
                held = self._partial.get(stream.name)
                if held is None or held[0] != key or held[1].device != out.device:
                    held = (key, out.new_empty(size, stream.numel))
                    fills.append(_Fill(held[1], key, stream.kind))
                    partial[stream.name] = held
                parts.append((rows, held[1][low - start : high - start]))
        _fill_all(fills)
        self._partial.update(partial)
        for rows, values in parts:
            rows.copy_(values)
        return outputs


class _Fill(NamedTuple):
    """A contiguous tensor ``[size, numel]`` to be filled with the noise of its block."""

    out: Tensor
    key: tuple[int | str, ...]
    kind: NoiseKind


def _fill_all(fills: Sequence[_Fill]) -> None:
    # A CPU draws normal numbers in one thread; meanwhile other threads can draw other blocks.
    serial = [fill for fill in fills if fill.kind == "gaussian" and fill.out.is_cpu]
    threads = min(torch.get_num_threads(), sum(fill.out.numel() for fill in serial) // _SHARED + 1)
    for fill in fills:
        if threads == 1 or fill.kind != "gaussian" or not fill.out.is_cpu:
            _fill(fill)
    if threads == 1:
        return
    # Large ones first, so that all threads end together.
    waiting = deque(sorted(serial, key=lambda fill: -fill.out.numel()))

    def work() -> None:
        # In a new thread no mode of torch's is on.
        with torch.inference_mode(serial[0].out.is_inference()), contextlib.suppress(IndexError):
            while True:
                _fill(waiting.popleft())

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def _fill(fill: _Fill) -> None:
    out = fill.out.view(-1)
    if fill.kind == "rademacher":
        # One random bit an element: 64-bit words are taken as bytes, and each byte stands for eight signs.
        words = _words(fill.key, (out.numel() + 63) // 64, out.device)
        signs = _signs_of_bytes(out.device).index_select(0, words.view(torch.uint8).int())
        out.copy_(signs.view(-1)[: out.numel()])
    elif out.is_cpu:
        # 16 random bits an element, which is twice as fast as torch's own numbers (32 bits, a logarithm, a root and a
        # sine), and the same on every CPU.
        words = _words(fill.key, (out.numel() + 3) // 4, out.device)
        torch.index_select(_normal_quantiles(), 0, words.view(torch.uint16)[: out.numel()].int(), out=out)
    else:
        out.normal_(generator=keyed_generator("noise", *fill.key, device=out.device))


def _words(key: tuple[int | str, ...], count: int, device: torch.device) -> Tensor:
    """Return ``count`` words of 64 random bits, as int64."""
    if device.type == "cpu":
        return torch.from_numpy(np.random.SFC64(_hash(16, "noise", *key)).random_raw(count).view(np.int64))
    words = torch.empty(count, dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=keyed_generator("noise", *key, device=device))


@functools.cache
def _normal_quantiles() -> Tensor:
    """Return, for every 16 bits, the middle one of the normal numbers that they stand for: ``[65536]``.

    They are symmetric, and scaled to unit variance; their kurtosis is 2.9992 where a normal number has 3.
    """
    with torch.inference_mode(False):
        positive = torch.special.ndtri((torch.arange(2**15, dtype=torch.float64) + (2**15 + 0.5)) / 2**16)
        positive /= positive.square().mean().sqrt()
        return torch.cat([positive, -positive]).float()


@functools.cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """Return, for every byte, its bits as ±1, the lowest first: ``[256, 8]``."""
    with torch.inference_mode(False):
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return (2.0 * bits - 1.0).to(device, torch.float32)
