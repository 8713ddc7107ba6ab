"""Random streams: noise is a pure function of (seed, generation, parameter name, member).

Nothing is stored across a generation and torch's global generator is never touched: whoever needs the noise of some
members again asks for it by the same key and gets the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

NoiseKind = Literal["gaussian", "rademacher"]

# Draws of one parameter come in blocks of this many, one random stream each, whatever part of them is asked for:
# so a draw does not depend on how a population is cut into chunks. Large parameters get smaller blocks.
_BLOCK_DRAWS = 64
_BLOCK_ELEMENTS = 2**20

# torch's CPU generator is a Mersenne Twister, whose `manual_seed` keeps only 32 bits of a seed: too few, as a large
# run opens billions of streams. The whole state is set instead; its serialised form is a header, 624 words in 64-bit
# slots, and the cache of an unfinished normal pair.
_WORDS = 624
_STATE_HEADER = 24


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
    return int.from_bytes(hashlib.blake2b(_key_bytes(*key), digest_size=8).digest(), "little")


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


class Noise:
    """Independent draws of zero mean and unit variance for the parameters of a model.

    Args:
        seed: Seed of the run.

    Example:
        >>> noise = Noise(seed=0)
        >>> block = noise.draw(generation=3, name="fc.weight", first=10, count=4, numel=7)
        >>> again = noise.draw(generation=3, name="fc.weight", first=12, count=1, numel=7)
        >>> torch.equal(block[2:3], again)
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # The last block of each parameter that was used in part: chunks smaller than a block come back for the rest.
        self._partial: dict[str, tuple[tuple[int | str, ...], Tensor]] = {}

    def draw(
        self,
        generation: int,
        name: str,
        first: int,
        count: int,
        numel: int,
        kind: NoiseKind = "gaussian",
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return draws ``first, …, first + count - 1`` of a parameter, ``[count, numel]`` in float32.

        Args:
            generation: Index of the generation.
            name: Name of the parameter in its model.
            first: Index of the first draw. A draw serves one member, or several if noise is reused.
            count: How many consecutive draws.
            numel: Random numbers in one draw.
            kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
            device: Where the noise is generated and returned.
        """
        out = torch.empty(count, numel, dtype=torch.float32, device=device)
        if count == 0 or numel == 0:
            return out
        size = max(1, min(_BLOCK_DRAWS, _BLOCK_ELEMENTS // numel))
        for block in range(first // size, (first + count - 1) // size + 1):
            start = block * size
            low, high = max(first, start), min(first + count, start + size)
            rows = out[low - first : high - first]
            key = (self.seed, generation, name, block, numel, kind)
            if high - low == size:
                _fill(rows, key, kind)
                continue
            held = self._partial.get(name)
            if held is None or held[0] != key or held[1].device != out.device:
                held = (key, _fill(out.new_empty(size, numel), key, kind))
                self._partial[name] = held
            rows.copy_(held[1][low - start : high - start])
        return out


def _fill(out: Tensor, key: tuple[int | str, ...], kind: NoiseKind) -> Tensor:
    """Fill a contiguous ``[size, numel]`` with the noise of its block."""
    generator = keyed_generator("noise", *key, device=out.device)
    if kind == "gaussian":
        return out.normal_(generator=generator)
    # One random bit an element: 64-bit words are unpacked to bytes, bytes to bits.
    words = torch.empty((out.numel() + 63) // 64, dtype=torch.int64, device=out.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8, device=out.device) & 1
    return out.copy_(bits.view(-1)[: out.numel()].view(out.shape)).mul_(2).sub_(1)
