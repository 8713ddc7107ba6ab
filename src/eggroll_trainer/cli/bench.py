"""``eggroll bench``: generations per second on this machine, compared with pure inference of the same rows."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import nn

from .. import EGGROLLTrainer, batched

DESCRIPTION = """Measure generations per second on this machine, compared with pure batched inference of the same rows.

The model is an MLP 32-256-256-256-8, and every member is scored on 16 rows. A generation draws the noise, runs all
members, and makes the step. Run it while the machine is idle.

Examples:
  eggroll bench
  eggroll bench --population-size 4096 --device cuda --json"""

_ROWS, _SIZES = 16, (32, 256, 256, 256, 8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    population_size: int = 1024
    """Members in a generation."""
    rank: int = 1
    """Rank of the perturbations."""
    device: str = "cpu"
    """Device to run on."""
    compile: bool = True
    """Whether to measure compiled forwards too, which takes some seconds more."""
    seconds: float = 3.0
    """Seconds to measure each kind."""
    json: bool = False
    """Whether to print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    settings = tyro.cli(Settings, args=arguments, prog="eggroll bench", description=DESCRIPTION)
    try:
        result = measured(settings)
    except (ValueError, RuntimeError) as error:
        print(f"eggroll bench: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if settings.json:
        print(json.dumps(result))
        return 0
    print(
        f"MLP {'-'.join(map(str, _SIZES))} on {_ROWS} rows, N = {settings.population_size}, rank {settings.rank},"
        f" float32, torch {torch.__version__}, {settings.device}, {torch.get_num_threads()} threads"
    )
    base = result["inference"]
    print(f"  {'pure inference of the same rows':34}{1000 * base:9.2f} ms")
    for kind in ("eager", "compiled"):
        if kind in result:
            seconds = result[kind]
            print(
                f"  {f'one generation, {kind}':34}{1000 * seconds:9.2f} ms {1 / seconds:8.1f} generations/s"
                f" {seconds / base:6.2f} × inference"
            )
    return 0


def measured(settings: Settings) -> dict[str, Any]:
    """Return the median seconds of pure inference and of a generation, by kind."""
    if settings.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {settings.seconds:g}")
    x = torch.randn(_ROWS, _SIZES[0], generator=torch.Generator().manual_seed(0)).to(settings.device)
    y = torch.zeros(_ROWS, _SIZES[-1], device=settings.device)
    rows = x.repeat(settings.population_size, 1)
    model = _model().to(settings.device)

    @batched
    def fitness(population: Any) -> torch.Tensor:
        return -(population(x) - y).square().mean((1, 2))

    def trainer(compiled: bool) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model=_model(),
            fitness_fn=fitness,
            population_size=settings.population_size,
            rank=settings.rank,
            noise_reuse=2 if settings.population_size % 2 == 0 else 0,
            device=settings.device,
            compile=compiled,
            seed=0,
        )

    kinds: dict[str, Callable[[], Any]] = {"inference": torch.inference_mode()(lambda: model(rows))}
    kinds["eager"] = trainer(False).step
    if settings.compile:
        kinds["compiled"] = trainer(True).step
    for run in kinds.values():
        _timed(run, settings.device), _timed(run, settings.device)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    until = time.perf_counter() + settings.seconds * len(kinds)
    # In turn, so that other load on the machine affects all kinds alike; at least three times.
    while time.perf_counter() < until or len(seconds["eager"]) < 3:
        for kind, run in kinds.items():
            seconds[kind].append(_timed(run, settings.device))
    return {
        **{kind: statistics.median(values) for kind, values in seconds.items()},
        "population_size": settings.population_size,
        "rank": settings.rank,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in zip(_SIZES, _SIZES[1:], strict=False):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def _timed(run: Callable[[], Any], device: str) -> float:
    begin = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin
