"""Time generations of W1 in one of the processes that share them, with one thread each; the first one prints JSON.

python -m benchmarks.one_rank LOCAL|scores|sums|auto N GENERATIONS [compile]
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch

from eggroll_trainer.distributed import Engine, LocalEngine, ProcessGroupEngine
from eggroll_trainer.update.exact_sum import ExactSum

from . import measure, workloads


def main(exchange: str, size: int, generations: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    engine: Engine = LocalEngine() if exchange == "local" else ProcessGroupEngine(exchange=exchange)  # type: ignore[arg-type]
    trainer = workloads.mlp().trainer(size, engine=engine, compile=compiled)
    for _ in range(2):
        trainer.step()
    sent = getattr(engine, "bytes_sent", 0)
    seconds = [measure.timed(trainer.step) for _ in range(generations)]
    result: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "bytes": (getattr(engine, "bytes_sent", 0) - sent) / generations,
        "parameters": len(trainer.current_params),
    }
    if exchange == "local":
        result |= parts(trainer)
    if engine.rank == 0:
        print(json.dumps(result))


def parts(trainer: Any) -> dict[str, float]:
    """Return the seconds of the parts of a chunk's work, and of what is done once a generation."""
    chunk, weights = trainer._evaluator.chunks()[0], torch.randn(trainer.population_size, dtype=torch.float64)
    trainer._method.begin_generation()

    def noise() -> None:
        trainer._method.sample(*chunk)

    def fresh() -> None:
        trainer._method.begin_generation()
        trainer._evaluator.evaluate(*chunk)

    def update() -> None:
        specs = trainer._method.specs()
        total = ExactSum({s.name: s.centre for s in specs}, {s.name: 1e3 for s in specs})
        first, size = chunk
        total.add(trainer._method.perturbations(first, size).weighted_sum(weights[first : first + size]))

    def step() -> None:
        trainer._centre.step({name: torch.zeros_like(p) for name, p in trainer._centre.parameters.items()}, [0.1])

    runs = {"noise": noise, "noise and forward": fresh, "update": update, "step": step}
    return measure.medians(measure.interleaved(runs, 15))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["compile"])
