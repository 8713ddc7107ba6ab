"""``eggroll plot RUN…``: plot runs, or compare them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..plotting import load_run, plot_runs

DESCRIPTION = """Plot the fitness of a run and every other number that changes, or compare several runs.

Examples:
  eggroll plot runs/CartPole-v1-0
  eggroll plot runs/* --out compared.svg --x steps
  eggroll plot runs/a-0 runs/a-1 runs/b-0 runs/b-1 --names a a b b
  eggroll plot metrics.csv checkpoint.pt --names mine theirs --style dark"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is plotted."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")]
    """Folders of runs, files of records (.jsonl, .csv), or checkpoints (.pt)."""
    out: Path = Path("plot.png")
    """File of the plot: .png, .svg or .pdf."""
    style: Literal["light", "dark", "print"] = "light"
    """Colours for light pages, for dark pages, or none for print."""
    x: str = "generation"
    """Column of the horizontal axis, such as generation or steps."""
    metrics: tuple[str, ...] | None = None
    """Numbers to show below the fitness; by default, all that change."""
    names: tuple[str, ...] = ()
    """Names of the runs; by default, their folders. Runs with the same name, such as seeds, become one curve."""
    title: str = ""
    """Title of the plot."""


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    settings = tyro.cli(Settings, args=arguments, prog="eggroll plot", description=DESCRIPTION)
    if not settings.runs:
        print("eggroll plot: name at least one run, such as runs/CartPole-v1-0", file=sys.stderr)
        return 2
    if settings.names and len(settings.names) != len(settings.runs):
        print(
            f"eggroll plot: {len(settings.names)} names for {len(settings.runs)} runs; give one name for each run",
            file=sys.stderr,
        )
        return 2
    names = settings.names or [None] * len(settings.runs)
    try:
        runs = [load_run(path, name) for path, name in zip(settings.runs, names, strict=True)]
        plot_runs(
            runs,
            settings.out,
            style=settings.style,
            x=settings.x,
            metrics=settings.metrics,
            title=settings.title or (runs[0].name if len(runs) == 1 else ""),
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"eggroll plot: {error}", file=sys.stderr)
        return 1
    print(f"plot: {settings.out}")
    return 0
