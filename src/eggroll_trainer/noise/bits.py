"""Random numbers of random bits: any part of a stream, the same on every device, and however many threads make it.

The words of a stream are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014): word ``i`` is ``mix(start + i·step)`` modulo 2⁶⁴, with a ``start`` and an odd ``step`` of the stream's own.
Normal numbers are quantiles of 16 bits each, which is twice as fast as torch's own (32 bits, a logarithm, a root and a
sine); signs take a bit each.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._utils.graphs import Kernel
from .._utils.memory import is_out_of_memory

NoiseKind = Literal["gaussian", "rademacher"]
Words = np.ndarray[Any, np.dtype[np.uint64]]

# Numbers that come of a word of 64 bits.
_PER_WORD: dict[NoiseKind, int] = {"gaussian": 4, "rademacher": 64}

# Numbers are made in rows of so many, each of one stream: one operation then makes those of many streams.
_ROW = 256

# Rows that are made at a time where nothing is compiled, so that their words are still in the cache when they are used.
_BATCH_ROWS = 512

# Rows that torch makes at a time, which bounds the memory that their words take.
_TORCH_ROWS = 2**16

# So many numbers are worth a second thread: for less it would find its core taken by torch's own, which look out for
# new work for some milliseconds after they have finished.
_SHARED = 2**22

# So many are worth a call of compiled code, which takes a tenth of a millisecond and a few seconds the first time.
_COMPILED = 2**18

# How SplitMix64 mixes a word: twice a shift and a multiplier, then a shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


class Part(NamedTuple):
    """Numbers ``start, …, stop - 1`` of a stream.

    Attributes:
        entropy: 16 bytes, the stream's.
        start: The first number.
        stop: One after the last.
    """

    entropy: bytes
    start: int
    stop: int


def random_numbers(
    parts: Sequence[Part], kind: NoiseKind, device: torch.device | str = "cpu", *, compile: bool = False
) -> list[Tensor]:
    """Return random numbers of zero mean and unit variance, ``[stop - start]`` in float32 for each part.

    Args:
        parts: At least one.
        kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
        device: Where they are made and returned.
        compile: Whether to make many numbers by compiled code: the same ones, faster.
    """
    per_word = _PER_WORD[kind]
    row_words = _ROW // per_word
    starts, steps, counts, slices, end = [], [], [], [], 0
    for part in parts:
        start, step = _start_and_step(part.entropy)
        word, skipped = divmod(part.start, per_word)
        size = part.stop - part.start
        # Where the stream would have to start for its words to come in the right row.
        starts.append((start + (word - end * row_words) * step) % 2**64)
        steps.append(step)
        counts.append(-(-(skipped + size) // _ROW))
        slices.append(slice(end * _ROW + skipped, end * _ROW + skipped + size))
        end += counts[-1]
    # Of unsigned words, products and sums are modulo 2⁶⁴.
    row_steps: Words = np.repeat(np.array(steps, np.uint64), counts)
    row_starts: Words = np.multiply(row_steps, np.arange(0, end * row_words, row_words, dtype=np.uint64))
    row_starts += np.repeat(np.array(starts, np.uint64), counts)
    out = torch.empty(end * _ROW, dtype=torch.float32, device=device)
    _fill(out, row_starts, row_steps, kind, compile and len(out) >= _COMPILED)
    return [out[own] for own in slices]


def _start_and_step(entropy: bytes) -> tuple[int, int]:
    start, step = int.from_bytes(entropy[:8], "little"), int.from_bytes(entropy[8:], "little") | 1
    # A step with few changes between neighbouring bits mixes badly; the generator's authors replace it like this.
    return start, step ^ 0xAAAAAAAAAAAAAAAA if (step ^ step >> 1).bit_count() < 24 else step


def _fill(out: Tensor, starts: Words, steps: Words, kind: NoiseKind, compile: bool) -> None:
    """Fill ``[rows·256]`` with the numbers of rows, whose words begin with ``starts`` and differ by ``steps``."""
    if not ((compile or not out.is_cpu) and _fill_by_torch(out, starts, steps, kind, compile)):
        _fill_by_numpy(out, starts, steps, kind)


# On a CPU, without compiled code.


def _fill_by_numpy(out: Tensor, starts: Words, steps: Words, kind: NoiseKind) -> None:
    batches = deque(slice(first, first + _BATCH_ROWS) for first in range(0, len(starts), _BATCH_ROWS))

    def work() -> None:
        # In a new thread no mode of torch's is on.
        with torch.inference_mode(out.is_inference()):
            while True:
                try:
                    rows = batches.popleft()
                except IndexError:
                    return
                words = torch.from_numpy(_words_by_numpy(starts[rows], steps[rows], _ROW // _PER_WORD[kind])).view(-1)
                own = out[rows.start * _ROW : rows.stop * _ROW]
                if kind == "gaussian":
                    torch.index_select(_normal_quantiles(out.device), 0, words.view(torch.uint16).int(), out=own)
                else:
                    torch.index_select(_signs_of_bytes(), 0, words.view(torch.uint8).int(), out=own.view(-1, 8))

    threads = min(torch.get_num_threads(), len(batches), len(out) // _SHARED + 1)
    if threads <= 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def _words_by_numpy(starts: Words, steps: Words, size: int) -> Words:
    """Return the words of each row, ``[rows, size]``."""
    words: Words = np.multiply(steps[:, None], np.arange(size, dtype=np.uint64))
    words += starts[:, None]
    shifted = np.empty_like(words)
    for shift, multiplier in _ROUNDS:
        words ^= np.right_shift(words, np.uint64(shift), out=shifted)
        words *= np.uint64(multiplier)
    words ^= np.right_shift(words, np.uint64(_LAST_SHIFT), out=shifted)
    return words


# Elsewhere, and compiled: the same numbers.


def _fill_by_torch(out: Tensor, starts: Words, steps: Words, kind: NoiseKind, compile: bool) -> bool:
    """Do so where NumPy cannot; return False on a CPU without a compiler."""
    function: Callable[..., None] = _gaussian if kind == "gaussian" else _rademacher
    tables = [_normal_quantiles(out.device)] if kind == "gaussian" else []
    for first in range(0, len(starts), _TORCH_ROWS):
        rows = slice(first, first + _TORCH_ROWS)
        words = [torch.from_numpy(array[rows].view(np.int64)).to(out.device) for array in (starts, steps)]
        # Memory that is there to write into is faster than new one.
        arguments = [*words, *tables, out[rows.start * _ROW : rows.stop * _ROW]]
        if not (compile and _run_compiled(function, *arguments)):
            if out.is_cpu:
                return False
            function(*arguments)
    return True


def _gaussian(starts: Tensor, steps: Tensor, table: Tensor, out: Tensor) -> None:
    short = _words(starts, steps, _ROW // _PER_WORD["gaussian"]).view(torch.int16)
    out.copy_(table[short.int() & 0xFFFF].view(-1))


def _rademacher(starts: Tensor, steps: Tensor, out: Tensor) -> None:
    halves = _words(starts, steps, _ROW // _PER_WORD["rademacher"]).view(torch.int32)
    bits = halves[..., None] >> torch.arange(32, dtype=torch.int32, device=out.device) & 1
    out.copy_((2 * bits - 1).view(-1))


def _words(starts: Tensor, steps: Tensor, size: int) -> Tensor:
    """Return the words of each row, ``[rows, size]`` in int64, whose shifts keep the sign and are masked therefore."""
    words = starts[:, None] + steps[:, None] * torch.arange(size, device=starts.device)
    for shift, multiplier in _ROUNDS:
        words = (words ^ _shifted(words, shift)) * (multiplier - 2**64)
    return words ^ _shifted(words, _LAST_SHIFT)


def _shifted(words: Tensor, shift: int) -> Tensor:
    return words >> shift & (1 << 64 - shift) - 1


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
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _FAILED.add(compiled)
        return False


_FAILED: set[Callable[..., None]] = set()


@functools.cache
def _compiled(function: Callable[..., None]) -> Kernel:
    return Kernel(function)


@functools.cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """Return, for every 16 bits, the middle one of the normal numbers that they stand for: ``[65536]``.

    They are symmetric, and scaled to unit variance; their kurtosis is 2.9992 where a normal number has 3.
    """
    # Reckoned on a CPU, to be the same everywhere.
    with torch.inference_mode(False), torch.device("cpu"):
        positive = torch.special.ndtri((torch.arange(2**15, dtype=torch.float64) + (2**15 + 0.5)) / 2**16)
        positive /= positive.square().mean().sqrt()
        return torch.cat([positive, -positive]).float().to(device)


@functools.cache
def _signs_of_bytes() -> Tensor:
    """Return, for every byte, its bits as ±1, the lowest first: ``[256, 8]``, on a CPU."""
    with torch.inference_mode(False), torch.device("cpu"):
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return (2.0 * bits - 1.0).float()
