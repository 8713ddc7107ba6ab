"""Predict the seconds of a generation on machines that are not at hand: ``python -m benchmarks.plan``.

The model, for ``K`` processes, ``N`` members of ``F`` forward operations each, ``D`` parameters and ``Z`` random
numbers a draw, antithetic pairs:

- noise: ``N/2·Z`` numbers; forward: ``N·F`` operations; update: ``N·D`` operations, as each draw adds an outer product
- shared by all processes: forward always; noise and update if sums are exchanged. With scores, each process draws and
  sums up everything.
- exchange: ``4·N`` bytes of scores; for sums ``8·D`` bytes besides, which a ring reduction sends and receives twice;
  each with a latency for every doubling of ``K``

What a machine is capable of is an assumption to be replaced by one's own measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one process does in a second.

    Attributes:
        numbers: Random numbers drawn.
        forward: Operations of a forward.
        update: Operations of the update.
        bandwidth: Bytes sent to the next process.
        latency: Seconds of a message.
    """

    numbers: float
    forward: float
    update: float
    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and what its fitness takes.

    Attributes:
        parameters: ``D``.
        numbers: ``Z``.
        forward: ``F``.
    """

    parameters: float
    numbers: float
    forward: float

    @classmethod
    def transformer(cls, layers: int, width: int, tokens: int) -> Work:
        """Return that of a decoder's layers at rank 1: four matrices of attention, two of the feed-forward."""
        parameters = layers * 12 * width**2
        return cls(parameters, layers * (4 * 2 + 2 * 5) * width, 2.0 * parameters * tokens)


def generation(machine: Machine, work: Work, members: int, processes: int, exchange: str) -> dict[str, float]:
    """Return the seconds of the parts of a generation."""
    share = 1 if exchange == "scores" else processes
    doublings = math.ceil(math.log2(processes)) if processes > 1 else 0
    travelling = 4 * members + (2 * 8 * work.parameters if exchange == "sums" else 0)
    return {
        "noise": (members / processes + (members - members / processes) * (exchange == "scores"))
        / 2
        * work.numbers
        / machine.numbers,
        "forward": members / processes * work.forward / machine.forward,
        "update": members / share * work.parameters / machine.update,
        "exchange": (travelling / machine.bandwidth if processes > 1 else 0.0) + 2 * doublings * machine.latency,
    }


# An accelerator of 2024 at about half of what its maker promises, and a network of 400 Gbit/s.
ACCELERATOR = Machine(numbers=2e10, forward=4e14, update=1e14, bandwidth=4e10, latency=2e-5)


def table(machine: Machine, work: Work, members: int) -> Iterator[str]:
    columns = ("noise", "forward", "update", "exchange")
    yield "| processes | exchange | " + " | ".join(f"{name}, s" for name in columns) + " | generation, s | efficiency |"
    yield "|" + "---|" * (len(columns) + 4)
    alone = sum(generation(machine, work, members, 1, "sums").values())
    for processes in (1, 8, 64, 1024):
        for exchange in ("scores", "sums"):
            parts = generation(machine, work, members, processes, exchange)
            total = sum(parts.values())
            cells = " | ".join(f"{parts[name]:.3g}" for name in columns)
            yield f"| {processes} | {exchange} | {cells} | {total:.3g} | {alone / processes / total:.0%} |"


if __name__ == "__main__":
    for text, work in (
        ("a transformer of 24 layers, width 1024, 64 tokens a member", Work.transformer(24, 1024, 64)),
        (
            "an MLP 256-256-256-256, 1,000 steps of a simulator a member",
            Work(3 * 256**2, 3 * 512, 2.0 * 3 * 256**2 * 1000),
        ),
    ):
        print(f"N = 2^20, {text}:\n")
        print("\n".join(table(ACCELERATOR, work, 2**20)), "\n")
