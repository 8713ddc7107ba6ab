"""Random numbers made of random bits on a CPU: the same on every CPU, and however many threads make them.

The bits are those of SFC64, a generator of a 256-bit state. Normal numbers are quantiles of 16 bits each, which is
twice as fast as torch's own (32 bits, a logarithm, a root and a sine); signs take a bit each.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

NoiseKind = Literal["gaussian", "rademacher"]

# Numbers that come of a word of 64 bits.
_PER_WORD: dict[NoiseKind, int] = {"gaussian": 4, "rademacher": 64}

# Numbers that are made at a time, whose bits are there together.
_BATCH = 2**20

# So many numbers are worth a second thread: for less it would find its core taken by torch's own, which look out for
# new work for some milliseconds after they have finished.
_SHARED = 2**22

# So many are worth a call of compiled code, which takes a tenth of a millisecond and a few seconds the first time.
_COMPILED = 2**18


class Part(NamedTuple):
    """Numbers ``start, …, stop - 1`` of a tensor, to be made of one stream of bits.

    Attributes:
        start: The first.
        stop: One after the last.
        entropy: 32 bytes, the stream's.
    """

    start: int
    stop: int
    entropy: bytes


def fill(out: Tensor, parts: Sequence[Part], kind: NoiseKind, *, compile: bool = False) -> None:
    """Fill parts of a tensor with random numbers of zero mean and unit variance.

    Args:
        out: ``[n]`` in float32, on a CPU.
        parts: The parts, in ascending order.
        kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
        compile: Whether to make many numbers by compiled code: the same ones, in several threads.
    """
    total = sum(part.stop - part.start for part in parts)
    compile = compile and total >= _COMPILED
    # Tables are looked up while the words are still in the cache.
    batches = list(_batches(parts, _PER_WORD[kind])) if compile else [[part] for part in parts]
    # Compiled code has threads of its own.
    threads = 1 if compile else min(torch.get_num_threads(), len(batches), total // _SHARED + 1)
    if threads <= 1:
        for batch in batches:
            _fill_batch(out, batch, kind, compile)
        return
    waiting = deque(batches)

    def work() -> None:
        # In a new thread no mode of torch's is on.
        with torch.inference_mode(out.is_inference()):
            while True:
                try:
                    batch = waiting.popleft()
                except IndexError:
                    return
                _fill_batch(out, batch, kind, False)

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def _batches(parts: Sequence[Part], per_word: int) -> Iterator[list[Part]]:
    """Split into runs of parts whose numbers, and whose words, lie one behind the other."""
    batch: list[Part] = []
    for part in parts:
        if batch:
            size = batch[-1].stop - batch[0].start
            if batch[-1].stop != part.start or size % per_word or size + part.stop - part.start > _BATCH:
                yield batch
                batch = []
        batch.append(part)
    if batch:
        yield batch


def _fill_batch(out: Tensor, batch: Sequence[Part], kind: NoiseKind, compile: bool) -> None:
    out = out[batch[0].start : batch[-1].stop]
    words = torch.from_numpy(_words(batch, _PER_WORD[kind]))
    if kind == "gaussian":
        table, short = _normal_quantiles(), words.view(torch.int16)[: len(out)]
        if not (compile and _run_compiled(_quantiles_of, short, table, out)):
            torch.index_select(table, 0, short.view(torch.uint16).int(), out=out)
    elif len(out) % 64:
        signs = torch.empty(64 * len(words))
        _look_up_signs(words, signs)
        out.copy_(signs[: len(out)])
    elif not (compile and _run_compiled(_signs_of, words.view(torch.int32), out)):
        _look_up_signs(words, out)


def _words(batch: Sequence[Part], per_word: int) -> np.ndarray[Any, Any]:
    """Return the words of 64 random bits that the numbers of a batch are made of, as int64."""
    generator, words = np.random.SFC64(0), []
    for part in batch:
        # Hashed already: what the constructor does to its seed takes as long as 4,000 numbers.
        state: Any = {"state": np.frombuffer(part.entropy, np.uint64)}
        generator.state = {"bit_generator": "SFC64", "state": state, "has_uint32": 0, "uinteger": 0}
        words.append(generator.random_raw(-(-(part.stop - part.start) // per_word)))
    return (words[0] if len(words) == 1 else np.concatenate(words)).view(np.int64)


def _look_up_signs(words: Tensor, out: Tensor) -> None:
    """Write the signs of each word's bits, the lowest first; a byte stands for eight of them."""
    torch.index_select(_signs_of_bytes(), 0, words.view(torch.uint8).int(), out=out.view(-1, 8))


# What is compiled gives the same numbers as the tables. It writes into `out`, as new memory takes longer.


def _quantiles_of(words: Tensor, table: Tensor, out: Tensor) -> None:
    out.copy_(table[words.int() & 0xFFFF])


def _signs_of(words: Tensor, out: Tensor) -> None:
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32) & 1
    out.view(-1, 32).copy_(2 * bits - 1)


def _run_compiled(function: Callable[..., None], *tensors: Tensor) -> bool:
    """Call compiled code; return False where there is none, for want of a compiler say, as forwards then report."""
    compiled = _compiled(function)
    if compiled in _FAILED:
        return False
    try:
        with warnings.catch_warnings():
            # What torch warns of while it compiles is for its own authors.
            warnings.simplefilter("ignore")
            compiled(*tensors)
        return True
    except Exception:
        _FAILED.add(compiled)
        return False


_FAILED: set[Callable[..., None]] = set()


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=True)


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
def _signs_of_bytes() -> Tensor:
    """Return, for every byte, its bits as ±1, the lowest first: ``[256, 8]``."""
    with torch.inference_mode(False):
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return (2.0 * bits - 1.0).float()
