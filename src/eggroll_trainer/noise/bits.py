"""Random numbers from a counter-based generator: any part of a stream, with the same bits on every device.

The words of a stream are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014): word ``i`` is ``mix(start + i·step)`` modulo 2⁶⁴. Each stream has its own ``start`` and odd ``step``. A normal
number is a quantile of 16 bits, looked up in a table. That is twice as fast as torch's generator, which takes 32 bits,
a logarithm, a root and a sine. A sign takes one bit.
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

# Random numbers per word of 64 bits.
_PER_WORD: dict[NoiseKind, int] = {"gaussian": 4, "rademacher": 64}

# Numbers are made in rows of this size. Each row belongs to one stream, so that one operation serves many streams.
_ROW = 256

# Rows per batch without compiled code, so that their words stay in the cache.
_BATCH_ROWS = 512

# Rows per batch with torch, to bound the memory of their words.
_TORCH_ROWS = 2**16

# Numbers per thread. For fewer, a further thread does not pay: torch's own threads keep their cores busy for some
# milliseconds after their work, waiting for more.
_SHARED = 2**22

# Smallest count for compiled code. A call costs a tenth of a millisecond, the first one a few seconds.
_COMPILED = 2**18

# The mixing function of SplitMix64: two rounds of a shift and a multiplication, then a shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


class Part(NamedTuple):
    """Numbers ``start, …, stop - 1`` of a stream.

    Attributes:
        entropy: The 16 bytes that define the stream.
        start: Index of the first number.
        stop: Index after the last number.
    """

    entropy: bytes
    start: int
    stop: int


def random_numbers(
    parts: Sequence[Part], kind: NoiseKind, device: torch.device | str = "cpu", *, compile: bool = False
) -> list[Tensor]:
    """Return random numbers of zero mean and unit variance, ``[stop - start]`` in float32 for each part.

    Args:
        parts: The parts to make, at least one.
        kind: ``"gaussian"``, or ``"rademacher"`` for ±1 with equal probability.
        device: Device on which the numbers are made and returned.
        compile: Whether to use compiled code for large counts. It gives the same numbers faster.
    """
    per_word = _PER_WORD[kind]
    row_words = _ROW // per_word
    starts, steps, counts, slices, end = [], [], [], [], 0
    for part in parts:
        start, step = _start_and_step(part.entropy)
        word, skipped = divmod(part.start, per_word)
        size = part.stop - part.start
        # The start for which row 0 would belong to this stream too, so that its own rows get the right words.
        starts.append((start + (word - end * row_words) * step) % 2**64)
        steps.append(step)
        counts.append(-(-(skipped + size) // _ROW))
        slices.append(slice(end * _ROW + skipped, end * _ROW + skipped + size))
        end += counts[-1]
    # Unsigned arithmetic wraps around modulo 2⁶⁴.
    row_steps: Words = np.repeat(np.array(steps, np.uint64), counts)
    row_starts: Words = np.multiply(row_steps, np.arange(0, end * row_words, row_words, dtype=np.uint64))
    row_starts += np.repeat(np.array(starts, np.uint64), counts)
    out = torch.empty(end * _ROW, dtype=torch.float32, device=device)
    _fill(out, row_starts, row_steps, kind, compile and len(out) >= _COMPILED)
    return [out[place] for place in slices]


def _start_and_step(entropy: bytes) -> tuple[int, int]:
    start, step = int.from_bytes(entropy[:8], "little"), int.from_bytes(entropy[8:], "little") | 1
    # As the generator's authors do, replace a step with few transitions between neighbouring bits: it mixes badly.
    return start, step ^ 0xAAAAAAAAAAAAAAAA if (step ^ step >> 1).bit_count() < 24 else step


def _fill(out: Tensor, starts: Words, steps: Words, kind: NoiseKind, compile: bool) -> None:
    """Fill ``[rows·256]`` with the numbers of rows, whose words begin with ``starts`` and differ by ``steps``."""
    if not ((compile or not out.is_cpu) and _fill_by_torch(out, starts, steps, kind, compile)):
        _fill_by_numpy(out, starts, steps, kind)


# On a CPU, without compiled code.


def _fill_by_numpy(out: Tensor, starts: Words, steps: Words, kind: NoiseKind) -> None:
    batches = deque(slice(first, first + _BATCH_ROWS) for first in range(0, len(starts), _BATCH_ROWS))

    def work() -> None:
        # Modes belong to threads: a new thread must enter inference mode itself.
        with torch.inference_mode(out.is_inference()):
            while True:
                try:
                    rows = batches.popleft()
                except IndexError:
                    return
                words = torch.from_numpy(_words_by_numpy(starts[rows], steps[rows], _ROW // _PER_WORD[kind])).view(-1)
                target = out[rows.start * _ROW : rows.stop * _ROW]
                if kind == "gaussian":
                    torch.index_select(_normal_quantiles(out.device), 0, words.view(torch.uint16).int(), out=target)
                else:
                    torch.index_select(_signs_of_bytes(), 0, words.view(torch.uint8).int(), out=target.view(-1, 8))

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


# On accelerators and with compiled code. The numbers are the same.


def _fill_by_torch(out: Tensor, starts: Words, steps: Words, kind: NoiseKind, compile: bool) -> bool:
    """Fill as :func:`_fill`, with torch; return False on a CPU without a compiler."""
    function: Callable[..., None] = _gaussian if kind == "gaussian" else _rademacher
    tables = [_normal_quantiles(out.device)] if kind == "gaussian" else []
    for first in range(0, len(starts), _TORCH_ROWS):
        rows = slice(first, first + _TORCH_ROWS)
        words = [torch.from_numpy(array[rows].view(np.int64)).to(out.device) for array in (starts, steps)]
        # Writing into existing memory is faster than allocating.
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
    """Return the words of each row, ``[rows, size]`` in int64."""
    words = starts[:, None] + steps[:, None] * torch.arange(size, device=starts.device)
    for shift, multiplier in _ROUNDS:
        words = (words ^ _shifted(words, shift)) * (multiplier - 2**64)
    return words ^ _shifted(words, _LAST_SHIFT)


def _shifted(words: Tensor, shift: int) -> Tensor:
    # A right shift of int64 copies the sign bit; the mask clears it.
    return words >> shift & (1 << 64 - shift) - 1


def _run_compiled(function: Callable[..., None], *tensors: Tensor) -> bool:
    """Call compiled code; return False if it fails, for example without a compiler. Forwards warn about that."""
    compiled = _compiled(function)
    if compiled in _FAILED:
        return False
    try:
        with warnings.catch_warnings():
            # Warnings of torch's compiler say nothing to users.
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
    """Return the normal number for each value of 16 bits, ``[65536]``: the middle of its quantile interval.

    The table is symmetric and scaled to unit variance. Its kurtosis is 2.9992; that of the normal distribution is 3.
    """
    # Computed on the CPU, to have the same bits on every device.
    with torch.inference_mode(False), torch.device("cpu"):
        positive = torch.special.ndtri((torch.arange(2**15, dtype=torch.float64) + (2**15 + 0.5)) / 2**16)
        positive /= positive.square().mean().sqrt()
        return torch.cat([positive, -positive]).float().to(device)


@functools.cache
def _signs_of_bytes() -> Tensor:
    """Return the bits of every byte as ±1, lowest bit first: ``[256, 8]``, on the CPU."""
    with torch.inference_mode(False), torch.device("cpu"):
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return (2.0 * bits - 1.0).float()
