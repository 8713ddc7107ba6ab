"""Print the seconds of a generation of W1 and its peak of memory: ``python -m benchmarks.one_generation N``."""

from __future__ import annotations

import sys

from . import measure, workloads


def main(size: int) -> None:
    workload = workloads.mlp()
    # What torch and the model take is there before.
    workload.trainer(64).step()
    trainer = workload.trainer(size)
    before = measure.peak_memory()
    measure.restart_peak()
    before = measure.peak_memory()
    first = measure.timed(trainer.step)
    print(min(first, measure.timed(trainer.step)), measure.peak_memory() - before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
