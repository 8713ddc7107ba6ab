"""A progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """A tqdm bar over generations with the mean and best fitness.

    Args:
        generations: How many there will be.
        verbose: Whether to show it at all.
    """

    def __init__(self, generations: int, verbose: bool) -> None:
        self._bar = tqdm(total=generations, unit="gen", disable=not verbose)

    def __enter__(self) -> Progress:
        return self

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of one more generation."""
        self._bar.set_postfix(
            mean=f"{metrics['mean_fitness']:.4g}", best=f"{metrics['best_fitness']:.4g}", refresh=False
        )
        self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
