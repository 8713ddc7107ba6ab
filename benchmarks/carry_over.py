"""Whether settings carry over to other populations, ranks, networks, optimizers: ``python -m benchmarks.carry_over``.

Digits as in ``benchmarks.settings``. The learning rate is tuned in every setting by a grid with steps of 2, and what
the documented rule makes of the best rate of the base setting is looked up in the grid of the other ones. The figure
is the cross-entropy on all training images, which is steadier than the accuracy: lower is better.

    OMP_NUM_THREADS=1 python -m benchmarks.carry_over    # about half an hour on a core
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import statistics
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .measure import surroundings
from .settings import SEEDS, data, trained

SIGMA, GENERATIONS = 0.1, 100
RATE = 0.3


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is changed, and what the rule makes of the learning rate."""

    name: str
    members: int = 256
    rank: int = 1
    hidden: int = 32
    adam: bool = False
    powers: range = range(-3, 5)

    def rule(self, base: Setting, rate: float) -> float:
        """Return the learning rate that follows from that of another setting."""
        if self.adam:
            return rate if base.adam else rate * SIGMA
        return rate * math.sqrt(base.members / self.members)

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid. Adam's rates are SIGMA times as large, which is what the rule says."""
        return tuple(RATE * (SIGMA if self.adam else 1.0) * 2.0**power for power in self.powers)


PLAIN, ADAM = Setting("plain step"), Setting("Adam", adam=True)
SETTINGS = (
    PLAIN,
    ADAM,
    Setting("plain step, 1,024 members", members=1024),
    Setting("Adam, 1,024 members", members=1024, adam=True),
    Setting("plain step, rank 8", rank=8),
    Setting("Adam, rank 8", rank=8, adam=True),
    Setting("plain step, 128 hidden units", hidden=128),
    Setting("Adam, 128 hidden units", hidden=128, adam=True),
    # Sixteen times the work: a part of the grid.
    Setting("plain step, 4,096 members", members=4096, powers=range(-2, 2)),
    Setting("Adam, 4,096 members", members=4096, adam=True, powers=range(0, 3)),
)


def loss_after(setting: Setting, rate: float, seed: int) -> float:
    """Train a network and return its cross-entropy on the training images."""
    model = trained(
        GENERATIONS,
        seed,
        rank=setting.rank,
        hidden=setting.hidden,
        population_size=setting.members,
        chunk_size=256,
        sigma=SIGMA,
        learning_rate=rate,
        optimizer=torch.optim.Adam if setting.adam else None,
    )
    if model is None:
        return math.inf
    images, labels, _, _ = data(seed)
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def results(done: Collection[str]) -> Iterator[dict[str, Any]]:
    """Train in every setting that is not done with every rate and seed."""
    for setting in SETTINGS:
        if setting.name in done:
            continue
        losses = {rate: [loss_after(setting, rate, seed) for seed in SEEDS] for rate in setting.rates}
        yield {"setting": setting.name, "losses": losses}


def summary(found: list[dict[str, Any]]) -> str:
    """Return the table: the best rate of each setting beside the one that the rule gives."""
    grids = {entry["setting"]: {float(r): statistics.mean(x) for r, x in entry["losses"].items()} for entry in found}
    best = {name: min(losses, key=losses.__getitem__) for name, losses in grids.items()}
    lines = ["| setting | rate by the rule | loss | best rate | loss |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        losses = grids.get(setting.name)
        if losses is None or setting is PLAIN:
            continue
        base = ADAM if setting.adam and setting is not ADAM else PLAIN
        rule = setting.rule(base, best[base.name])
        # The grid's steps are factors of 2, and so are those of the rule here.
        nearest = min(losses, key=lambda rate: abs(math.log(rate / rule)))
        lines.append(
            f"| {setting.name} | {nearest:.3g} | {losses[nearest]:.3f} |"
            f" {best[setting.name]:.3g} | {losses[best[setting.name]]:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what today's file lacks, write it, and print the table."""
    path = Path(f"docs/research/results/{datetime.date.today().isoformat()}-carry-over.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
    for entry in results([entry["setting"] for entry in found]):
        found.append(entry)
        print(entry, file=sys.stderr, flush=True)
        path.write_text(json.dumps({"surroundings": surroundings(), "results": found}, indent=1) + "\n")
    print(summary(found))


if __name__ == "__main__":
    main()
