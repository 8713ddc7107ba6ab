"""Random streams: noise is a pure function of (seed, generation, parameter name, member).

Noise is not stored: the same key gives the same bits again. torch's global generator is never used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .bits import NoiseKind, Part, random_numbers

# Streams are drawn together up to this many numbers, which share one allocation.
_GROUP_NUMBERS = 2**24

# torch's CPU generator is a Mersenne Twister, and its `manual_seed` keeps only 32 bits of a seed. Among a hundred
# thousand streams, some would be equal. So we set the whole state. Its serialised form is a header, 624 words in 64-bit
# slots, and a cached normal number.
_WORDS = 624
_STATE_HEADER = 24

# Bound of the magnitude of normal numbers, which are quantiles of 16 random bits.
LARGEST_NORMAL = 4.4


def check_noise_kind(kind: object) -> NoiseKind:
    """Return ``kind`` if it names a distribution of low-rank factors.

    Raises:
        ValueError: It does not.
    """
    if kind not in get_args(NoiseKind):
        raise ValueError(f"noise must be one of {', '.join(map(repr, get_args(NoiseKind)))}, got {kind!r}")
    return kind  # type: ignore[return-value]


def _key_bytes(*key: int | str) -> bytes:
    """Serialise a key; different keys have different bytes."""
    return b"".join(
        b"%c%d:%s" % (b"is"[isinstance(part, str)], len(text), text) for part in key for text in [str(part).encode()]
    )


def derive_seed(*key: int | str) -> int:
    """Return a 64-bit seed that is a hash of the whole ``key``."""
    return int.from_bytes(_digest(8, *key), "little")


def _digest(size: int, *key: int | str) -> bytes:
    """Return ``size`` bytes that are a hash of the whole ``key``."""
    return hashlib.blake2b(_key_bytes(*key), digest_size=size).digest()


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of ``key`` alone.

    Args:
        key: Integers and strings; changing any of them changes the whole stream.
        device: Device of the generator. The streams of different device types differ.
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
    return torch.Generator("cpu").manual_seed(0).get_state().numpy()


@contextlib.contextmanager
def forked_rng(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators from ``key`` inside the block, and restore them after it.

    Dropout and custom trainers draw from the global generators. Inside the block, they depend on the trainer's seed
    alone, and the caller's generators do not advance.
    """
    device = torch.device(device)
    with kept_rng([device]):
        torch.set_rng_state(keyed_generator(*key).get_state())
        if _has_generator(device):
            state = keyed_generator(*key, device=device).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield


@contextlib.contextmanager
def kept_rng(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore torch's global generators of the CPU and of ``devices`` after the block."""
    with contextlib.ExitStack() as stack:
        # Without device_type, fork_rng looks for the accelerator's module even if there are no devices.
        stack.enter_context(torch.random.fork_rng([], device_type="cuda"))
        for device in devices:
            if _has_generator(device):
                stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        yield


def _has_generator(device: torch.device) -> bool:
    """Return whether a device has a global generator besides the CPU's."""
    return device.type not in ("cpu", "meta")


class Stream(NamedTuple):
    """The random stream of one parameter.

    Attributes:
        name: Name of the parameter in its model.
        numel: Number of random numbers in one draw.
        kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
        device: Device on which the noise is made and returned.
    """

    name: str
    numel: int
    kind: NoiseKind = "gaussian"
    device: torch.device | str = "cpu"


class Noise:
    """Independent draws of zero mean and unit variance for the parameters of a model.

    Args:
        seed: Seed of the run.
        compile: Whether to use compiled code for large draws. It gives the same numbers faster.

    Example:
        >>> noise = Noise(seed=0)
        >>> stream = Stream("fc.weight", numel=7)
        >>> (block,) = noise.draw(generation=3, first=10, count=4, streams=[stream])
        >>> (again,) = noise.draw(generation=3, first=12, count=1, streams=[stream])
        >>> torch.equal(block[2:3], again)
        True
    """

    def __init__(self, seed: int, *, compile: bool = False) -> None:
        self.seed, self.compile = seed, compile

    def draw(self, generation: int, first: int, count: int, streams: Sequence[Stream]) -> list[Tensor]:
        """Return draws ``first, …, first + count - 1`` of each stream, ``[count, numel]`` in float32.

        Args:
            generation: Index of the generation.
            first: Index of the first draw. A draw serves one member, or several if noise is reused.
            count: Number of consecutive draws, at least 1.
            streams: The streams to draw from, with different names.
        """
        drawn: dict[str, Tensor] = {}
        for group in _groups(streams, count):
            parts = [
                Part(self._entropy(generation, stream), first * stream.numel, (first + count) * stream.numel)
                for stream in group
            ]
            values = random_numbers(parts, group[0].kind, group[0].device, compile=self.compile)
            for stream, numbers in zip(group, values, strict=True):
                drawn[stream.name] = numbers.view(count, stream.numel)
        return [drawn[stream.name] for stream in streams]

    def _entropy(self, generation: int, stream: Stream) -> bytes:
        return _digest(16, "noise", self.seed, generation, stream.name, stream.numel, stream.kind)


def _groups(streams: Sequence[Stream], count: int) -> Iterator[list[Stream]]:
    """Split streams into groups of one kind and device, of limited size, whose noise is made together."""
    alike: dict[tuple[str, str], list[Stream]] = {}
    for stream in streams:
        group = alike.setdefault((stream.kind, str(stream.device)), [])
        if group and sum(other.numel for other in [*group, stream]) * count > _GROUP_NUMBERS:
            yield group.copy()
            group.clear()
        group.append(stream)
    yield from alike.values()
