"""A progress bar, or lines of text if there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from .callback import Callback, Metrics, Trainer

# Seconds between two lines in a file or a pipe.
_SECONDS = 10.0

_LIGHTS = {"green": "🟢", "yellow": "🟡", "red": "🔴"}


class Progress(Callback):
    """Shows the generation, the rate, the time left, the mean and best fitness, and the status of the diagnostics.

    In a terminal or a notebook it shows a bar. In a file or a pipe it writes a line now and then.

    Args:
        generations: Number of generations to come; None if unknown.
        verbose: Whether to show anything.
    """

    def __init__(self, generations: int | None = None, verbose: bool = True) -> None:
        self.generations, self.verbose = generations, verbose
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.verbose:
            self._bar = _Lines(self.generations) if _is_piped() else tqdm(total=self.generations, unit="gen")
        return self

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of one more generation."""
        if self._bar is not None:
            self._bar.set_postfix_str(postfix(metrics), refresh=False)
            self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # For use in a list of callbacks.

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar."""
        self.__enter__()

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> None:
        """Show the metrics of one more generation."""
        self.update(metrics)

    def on_end(self, trainer: Trainer) -> None:
        """Close the bar."""
        self.__exit__(None, None, None)


def postfix(metrics: Mapping[str, Any]) -> str:
    """Return the text of a bar for a generation: mean and best fitness, and ``metrics["status"]`` as a traffic light.

    Example:
        >>> postfix({"mean_fitness": 0.12345, "best_fitness": 0.5, "status": "yellow"})
        'mean=0.1235, best=0.5, 🟡 yellow'
    """
    shown = f"mean={metrics['mean_fitness']:.4g}, best={metrics['best_fitness']:.4g}"
    status = metrics.get("status")
    if not isinstance(status, str) or not status:
        return shown
    # Always show the word: colour-blind users cannot rely on the sign, and not every terminal has it.
    sign = f"{_LIGHTS[status]} " if status in _LIGHTS and _has_signs() else ""
    return f"{shown}, {sign}{status}"


def _is_piped() -> bool:
    """Return whether stderr is neither a terminal nor that of a notebook."""
    stderr = sys.stderr
    in_notebook = type(stderr).__module__.startswith("ipykernel")
    return not in_notebook and not (hasattr(stderr, "isatty") and stderr.isatty())


def _has_signs() -> bool:
    return "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()


class _Lines:
    """A replacement for tqdm's bar that writes lines: the first, the last, and one every ten seconds."""

    def __init__(self, total: int | None) -> None:
        self._total, self._done, self._postfix = total, 0, ""
        self._began = time.monotonic()
        self._shown_at, self._shown = float("-inf"), 0

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        self._postfix = text

    def update(self) -> None:
        self._done += 1
        if self._done == self._total or time.monotonic() - self._shown_at >= _SECONDS:
            self._show()

    def close(self) -> None:
        if self._done > self._shown:
            self._show()

    def _show(self) -> None:
        self._shown_at, self._shown = time.monotonic(), self._done
        seconds = max(self._shown_at - self._began, 1e-9)
        rate = self._done / seconds
        of, left = "", ""
        if self._total is not None:
            of = f"/{self._total}"
            left = f"<{tqdm.format_interval((self._total - self._done) / rate)}"
        spent = tqdm.format_interval(seconds)
        # A closed pipe must not end the run.
        with contextlib.suppress(OSError):
            print(f"{self._done}{of} [{spent}{left}, {rate:.4g}gen/s, {self._postfix}]", file=sys.stderr, flush=True)
