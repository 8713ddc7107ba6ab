"""Measures a step for each parameter: its length, its signal, its rank, and how many stored values change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .signal import Signal


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """Measurements of a step for one parameter.

    Attributes:
        weights: Number of its weights.
        relative_update: Norm of the step divided by the norm of the parameter; 0 if the parameter is zero.
        split_half_cosine: Expected cosine between updates of this parameter from two halves of the population; 0 for
            pure noise. None if the signal is not known.
        signal_share: Its share of the signal in all parameters, from 0 to 1; None if the signal is not known or zero.
        effective_rank: ``(Σs²)²/Σs⁴``, where ``s`` are the singular values of a matrix's step ``[O, I]``. It is 1 for a
            step of rank 1, ``O·I/(O + I + 1)`` for independent normal numbers, and at most ``min(O, I)``. None for a
            vector, or if the step is zero.
        changed_share: Fraction of the weights whose stored value has changed. Steps that are too small for bf16 or fp16
            weights add up in the float32 masters, and change the stored values later.

    Example:
        >>> LayerFigures(128, 0.01, 0.3, 0.8, 4.2, 1.0).relative_update
        0.01
    """

    weights: int
    relative_update: float
    split_half_cosine: float | None
    signal_share: float | None
    effective_rank: float | None
    changed_share: float

    def plain(self) -> dict[str, float]:
        """Return the measurements by name, without those that are None and without the number of weights."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "weights"}


def effective_rank(matrix: Tensor) -> float | None:
    """Return ``(Σs²)²/Σs⁴`` of the singular values of a matrix ``[O, I]``; None for zeros.

    No decomposition is needed: ``Σs²`` is the matrix's squared norm, and ``Σs⁴`` that of its smaller Gram matrix.

    Example:
        >>> effective_rank(torch.eye(5)), effective_rank(torch.ones(3, 4)), effective_rank(torch.zeros(2, 2))
        (5.0, 1.0, None)
    """
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0:
        return None
    # Squares of small steps would underflow.
    scaled = matrix / largest
    tall = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.mT
    squares = torch.linalg.vector_norm(scaled) ** 2
    return float((squares / torch.linalg.matrix_norm(tall @ tall.mT)) ** 2)


def layer_figures(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], signal: Signal | None
) -> dict[str, LayerFigures]:
    """Return the measurements of a step by the name of the parameter.

    Args:
        before: The parameters before the step, in float32 or wider.
        after: The parameters after the step.
        dtypes: The dtype in which each parameter is stored.
        signal: The signal in the estimate that the step was made from; None if unknown.

    Example:
        >>> w = torch.ones(2, 2)
        >>> layer_figures({"w": w}, {"w": 1.5 * w}, {"w": w.dtype}, None)["w"].relative_update
        0.5
    """
    return dict(_figures(before, after, dtypes, signal))


def _figures(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], signal: Signal | None
) -> Iterator[tuple[str, LayerFigures]]:
    parts = {} if signal is None else signal.parts
    # The estimate of a squared length may be negative by chance.
    signals = {} if signal is None else {name: max(0.0, signal.of(part)) for name, part in parts.items()}
    total = sum(signals.values())
    for name, old in before.items():
        new = after.get(name)
        if new is None or not old.numel():
            continue
        step = new - old
        length = float(torch.linalg.vector_norm(old))
        halves = None
        if signal is not None and name in parts:
            halves = dataclasses.replace(signal, parts={name: parts[name]}).split_half_cosine
        yield (
            name,
            LayerFigures(
                weights=old.numel(),
                relative_update=float(torch.linalg.vector_norm(step)) / length if length else 0.0,
                split_half_cosine=halves,
                signal_share=signals[name] / total if name in signals and total > 0 else None,
                effective_rank=effective_rank(step.flatten(1)) if step.ndim >= 2 else None,
                changed_share=float((old.to(dtypes[name]) != new.to(dtypes[name])).double().mean()),
            ),
        )


def table(layers: Mapping[str, LayerFigures]) -> str:
    """Return measurements as a text table.

    Example:
        >>> print(table({"0.weight": LayerFigures(128, 0.0123, 0.31, 0.8, 4.2, 1.0)}))
        parameter  weights  relative update  split-half cosine  signal share  effective rank  changed
        0.weight       128            0.012               0.31           80%             4.2     100%
    """
    heads = ("weights", "relative update", "split-half cosine", "signal share", "effective rank", "changed")
    rows = [
        (
            name,
            f"{one.weights:,}",
            f"{one.relative_update:.2g}",
            _shown(one.split_half_cosine, ".2f"),
            _shown(one.signal_share, ".0%"),
            _shown(one.effective_rank, ".1f"),
            f"{one.changed_share:.0%}",
        )
        for name, one in layers.items()
    ]
    width = max([len("parameter"), *(len(row[0]) for row in rows)])
    lines = [
        "  ".join([name.ljust(width), *(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))])
        for name, *cells in [("parameter", *heads), *rows]
    ]
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
