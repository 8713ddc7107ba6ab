"""Shaping: from the scores of a population to the weights of its perturbations.

A shaper is any callable ``[n] → [n]`` in float64; it is applied to each group of members on its own. Those here also
take many groups at once, ``[..., n] → [..., n]``. How members with a score for each of several tasks are shaped,
:func:`shape` says.
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
    """Return ``(f - mean(f)) / std(f)``, and zeros where all scores are equal.

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
    # By rounding, the mean of equal numbers may be another one.
    centred = torch.where(equal, 0.0, scores - scores.mean(-1, keepdim=True))
    # Scaled first, so that tiny or huge scores neither vanish nor overflow when squared.
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
    """Return the scores as they are.

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
    """Return the shaper that ``shaping`` names or is.

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
    """Return a name that tells shapers apart: those here by their own, others by where and how they are written.

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
    """Return the code of a function, with the numbers and words that it closes over or an object holds."""
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

    With a score for each of ``K`` tasks, every task is shaped over the members (of a group) by itself, and a member's
    weight is its mean over the tasks: of its ranks for ``"centered_ranks"``, of its pair's signs for
    ``"antithetic_sign"``, of its scores for ``"raw"``, of what a callable returns for each task's scores ``[n]``.
    Z-scores alone look at all tasks of a group at once: ``w = mean_k(f_k - mean(f_k)) / std``, where ``std`` is that of
    all centred scores. A task in which members hardly differ then counts for little; a z-score of its own would make
    it count as much as any other.

    Args:
        scores: Finite scores ``[N]``, or ``[N, K]``.
        shaper: What to apply to each group.
        group_size: Members in a group; 0 for one group of all.

    Returns:
        ``[N]``.

    Raises:
        ValueError: The shaper returned something other than one finite number for each score.

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
