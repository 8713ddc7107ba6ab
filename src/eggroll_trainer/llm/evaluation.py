"""The result of an evaluation on prompts, and statistics of the completions of a generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .completions import Completion

# Number of completions that are shown, and of characters of each.
_SHOWN, _CHARACTERS = 3, 200


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Rewards of one model on ``n`` prompts, with ``S`` samples each.

    Attributes:
        reward: The mean reward.
        rewards: ``[n, S]`` in float64, the weighted sums of the reward functions.
        each: By name, the mean of each reward function over the completions to which it applies.
        pass_at_k: For ``k = 1, 2, 4, …`` up to ``S``, the expected best reward of ``k`` samples; pass@k if rewards are
            0 or 1.
        length: Mean number of tokens of a completion.
        ended: Share of completions that ended by themselves, within the allowed number of tokens.
        kl: Mean divergence from the reference model, in nats per completion; None without a reference.
        prompts: The ``n`` prompts, as in the data set.
        completions: The texts of the completions, ``S`` for each prompt.
    """

    reward: float
    rewards: Tensor
    each: dict[str, float]
    pass_at_k: dict[int, float]
    length: float
    ended: float
    kl: float | None
    prompts: list[Any]
    completions: list[list[str]]

    def __str__(self) -> str:
        """Return the figures, and some completions."""
        parts = [f"reward {self.reward:.4g}"]
        if len(self.each) > 1:
            parts += [f"{name} {value:.4g}" for name, value in self.each.items()]
        parts += [f"pass@{k} {value:.4g}" for k, value in self.pass_at_k.items() if k > 1]
        parts += [f"{self.length:.1f} tokens", f"{self.ended:.0%} ended"]
        if self.kl is not None:
            parts.append(f"KL {self.kl:.3g}")
        lines = [", ".join(parts)]
        for prompt, texts, rewards in list(zip(self.prompts, self.completions, self.rewards, strict=True))[:_SHOWN]:
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            lines.append(f"  {_short(shown)} → {_short(texts[0])} ({float(rewards[0]):.4g})")
        return "\n".join(lines)


def _short(text: Any) -> str:
    text = repr(str(text))
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"


class Tally:
    """Computes sums over completions, which can be added over chunks, and means from these.

    Args:
        names: Names of the reward functions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def of(self, completions: Sequence[Completion], totals: Tensor, each: Tensor, divergence: Tensor | None) -> Tensor:
        """Return the sums over completions, ``[7 + 2·functions]`` in float64.

        Args:
            completions: The completions, ``rows`` of them.
            totals: Their rewards, ``[rows]``.
            each: The rewards of each function, ``[rows, functions]``; NaN if it does not apply.
            divergence: Their divergences, ``[rows]``, or None.
        """
        rows = len(completions)
        tokens = sum(len(completion.tokens) for completion in completions)
        ended = sum(completion.ended for completion in completions)
        finite = totals.isfinite()
        sums = [float(rows), float(tokens), float(ended), float(totals[finite].sum()), float(finite.sum())]
        sums += [0.0, 0.0] if divergence is None else [float(divergence.sum()), float(rows)]
        for column in each.T:
            applies = column.isfinite()
            sums += [float(column[applies].sum()), float(applies.sum())]
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def nothing(self) -> Tensor:
        """Return the sums over no completions."""
        return torch.zeros(7 + 2 * len(self.names), dtype=torch.float64, device="cpu")

    def means(self, sums: Tensor) -> dict[str, float]:
        """Return means by name, without those over no completions."""
        rows, tokens, ended, total, finite, divergence, diverging, *of_functions = sums.tolist()
        pairs = {
            "reward": (total, finite),
            "completion_length": (tokens, rows),
            "ended": (ended, rows),
            "kl": (divergence, diverging),
        }
        for i, name in enumerate(self.names):
            pairs[f"rewards/{name}"] = of_functions[2 * i], of_functions[2 * i + 1]
        return {name: total / count for name, (total, count) in pairs.items() if count > 0}
