"""Shaping: from the scores of a population to the weights of its perturbations.

A shaper is any callable ``[n] → [n]`` in float64. It is applied to each group of members separately. The shapers here
also take many groups at once, ``[..., n] → [..., n]``. See :func:`shape` for members with scores for several tasks.
"""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shaper = Callable[[Tensor], Tensor]


def zscore(scores: Tensor) -> Tensor:
    """Return ``(f - mean(f)) / std(f)``, or zeros if all scores are equal.

    The standard deviation is the population's own (divided by ``n``), so the weights have unit variance.

    Example:
        >>> zscore(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    return _zscore_of_tasks(scores.unsqueeze(-2))


def _zscore_of_tasks(scores: Tensor) -> Tensor:
    """Return ``mean_k(f_k - mean(f_k)) / std`` over tasks ``k``, ``[..., K, n] → [..., n]``.

    ``std`` is that of all ``K·n`` scores, each centred on the mean of its task.
    """
    equal = (scores == scores[..., :1]).all(-1, keepdim=True)
    # The mean of equal numbers may differ from them by rounding.
    centred = torch.where(equal, 0.0, scores - scores.mean(-1, keepdim=True))
    # Scale first, so that squares of tiny or huge scores neither underflow nor overflow.
    centred = centred / centred.abs().amax((-2, -1), keepdim=True)
    spread = centred.square().mean((-2, -1), keepdim=True).sqrt()
    return torch.where(equal.all(-2), 0.0, (centred / spread).mean(-2))


def centered_ranks(scores: Tensor) -> Tensor:
    """Return ranks scaled to [-0.5, 0.5]; equal scores share their mean rank (Salimans et al., 2017, section 2.1).

    Example:
        >>> centered_ranks(torch.tensor([10.0, 500.0, 20.0, 20.0])).tolist()
        [-0.5, 0.5, 0.0, 0.0]
    """
    ordered, values = scores.sort(-1).values, scores.contiguous()
    worse = torch.searchsorted(ordered, values)
    not_better = torch.searchsorted(ordered, values, right=True)
    mean_rank = (worse + not_better - 1).to(scores.dtype) / 2
    return mean_rank / max(1, scores.shape[-1] - 1) - (0.5 if scores.shape[-1] > 1 else 0.0)


def antithetic_sign(scores: Tensor) -> Tensor:
    """Return the sign of each antithetic pair's difference: +1 for the better of the two, -1 for the other.

    Example:
        >>> antithetic_sign(torch.tensor([1.0, 3.0, 5.0, 5.0])).tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    signs = (scores[..., ::2] - scores[..., 1::2]).sign()
    return torch.stack([signs, -signs], -1).flatten(-2) + 0.0


def raw(scores: Tensor) -> Tensor:
    """Return the scores unchanged.

    Example:
        >>> raw(torch.tensor([1.0, 3.0])).tolist()
        [1.0, 3.0]
    """
    return scores


SHAPERS: dict[str, Shaper] = {
    "zscore": zscore,
    "centered_ranks": centered_ranks,
    "antithetic_sign": antithetic_sign,
    "raw": raw,
}


def get_shaper(shaping: str | Shaper, noise_reuse: int) -> Shaper:
    """Return the shaper of a name, or a callable itself.

    Raises:
        ValueError: There is no shaper of that name, or it needs antithetic pairs and there are none.
        TypeError: It is neither a name nor callable.
    """
    if shaping in (antithetic_sign, "antithetic_sign") and noise_reuse != 2:
        raise ValueError(
            f"shaping 'antithetic_sign' compares the members of a pair and needs noise_reuse=2, got {noise_reuse}"
        )
    if isinstance(shaping, str):
        if shaping not in SHAPERS:
            raise ValueError(f"shaping must be one of {', '.join(map(repr, SHAPERS))} or callable, got {shaping!r}")
        return SHAPERS[shaping]
    if not callable(shaping):
        raise TypeError(f"shaping must be a name or a callable, got {type(shaping).__name__}")
    return shaping


def shaper_name(shaping: str | Shaper) -> str:
    """Return a name that identifies a shaper: a name of this module, or module, name and a checksum of the code.

    Example:
        >>> shaper_name(zscore), shaper_name("raw")
        ('zscore', 'raw')
        >>> shaper_name(lambda scores: 2 * scores) == shaper_name(lambda scores: 3 * scores)
        False
    """
    if isinstance(shaping, str):
        return shaping
    for name, shaper in SHAPERS.items():
        if shaping is shaper:
            return name
    if isinstance(shaping, functools.partial):
        return f"{shaper_name(shaping.func)} with {shaping.args} {shaping.keywords}"
    described: Any = shaping if hasattr(shaping, "__qualname__") else type(shaping)
    return f"{described.__module__}.{described.__qualname__}:{zlib.crc32(_written(shaping)):08x}"


def _written(shaper: Any) -> bytes:
    """Return the bytes of a function's code, and of numbers and strings in its closure, defaults or attributes."""
    code = getattr(shaper, "__code__", None)
    held = [cell.cell_contents for cell in getattr(shaper, "__closure__", None) or ()]
    held += [*(getattr(shaper, "__defaults__", None) or ()), *getattr(shaper, "__dict__", {}).values()]
    values = [repr(value).encode() for value in held if isinstance(value, (bool, int, float, str))]
    return b"\0".join([b"" if code is None else _code_bytes(code), *values])


def _code_bytes(code: types.CodeType) -> bytes:
    constants = [_code_bytes(c) if isinstance(c, types.CodeType) else repr(c).encode() for c in code.co_consts]
    return b"\0".join([code.co_code, *constants, *(name.encode() for name in code.co_names)])


def shape(scores: Tensor, shaper: Shaper, group_size: int = 0) -> Tensor:
    """Return the weight of each member's perturbation, ``[N]``.

    With a score for each of ``K`` tasks, each task is shaped separately over the members of a group, and a member's
    weight is the mean over tasks. Only z-scores use all tasks of a group at once:
    ``w = mean_k(f_k - mean(f_k)) / std``, where ``std`` is that of all centred scores. A task in which members hardly
    differ then has little influence. With a z-score for each task, it would have as much as any other.

    Args:
        scores: Finite scores ``[N]``, or ``[N, K]``.
        shaper: The shaper, which is applied to each group.
        group_size: Number of members in a group; 0 for one group of all.

    Returns:
        ``[N]``.

    Raises:
        ValueError: The shaper does not return one finite number for each score.

    Example:
        >>> shape(torch.tensor([1.0, 2.0, 30.0, 40.0]), zscore, group_size=2).tolist()
        [-1.0, 1.0, -1.0, 1.0]

    References:
        "Evolution Strategies at the Hyperscale", arXiv 2511.16652, on language models: the mean of each prompt is
        subtracted, and all are divided by the global standard deviation.
    """
    count = group_size or len(scores)
    groups = scores.double().view(-1, count, *scores.shape[1:])
    if scores.ndim == 1:
        return _of_groups(groups, shaper)
    # [G, K, n]
    tasks = groups.mT.contiguous()
    if shaper is zscore:
        return _zscore_of_tasks(tasks).view(-1)
    weights = _of_groups(tasks.view(-1, count), shaper)
    return weights.view(-1, scores.shape[1], count).mean(1).view(-1)


def _of_groups(groups: Tensor, shaper: Shaper) -> Tensor:
    """Return the weights of groups ``[G, n]``, one group after the other, ``[G·n]``."""
    if shaper in SHAPERS.values():
        return shaper(groups).view(-1)
    weights = []
    for group in groups:
        shaped = shaper(group.clone())
        if not isinstance(shaped, Tensor) or shaped.shape != group.shape or not shaped.isfinite().all():
            got = f"{shaped}" if isinstance(shaped, Tensor) else type(shaped).__name__
            raise ValueError(f"shaping must return a tensor of {len(group)} finite weights, got {got}")
        weights.append(shaped.to(group))
    return torch.cat(weights)
