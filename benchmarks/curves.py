"""Keep the evaluations of runs of `eggroll rl` as data, and draw them and those of `examples/larger_number.py`.

python -m benchmarks.curves runs/HalfCheetah-v5-0 runs/HalfCheetah-v5-1 …    # adds to docs/data, and draws
python -m benchmarks.curves                                                  # draws what is there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from .measure import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA, PICTURES = ROOT / "docs" / "data", ROOT / "docs" / "images"
KEPT = ("generation", "steps", "mean_return", "eval_return", "eval_std")


def keep(run: Path) -> None:
    """Write a run's evaluations to the data, with the seconds of training up to each."""
    seconds, lines = 0.0, []
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        seconds += line["seconds"]
        if "eval_return" in line:
            values = {key: line[key] if isinstance(line[key], int) else round(line[key], 1) for key in KEPT}
            lines.append(json.dumps({**values, "seconds": round(seconds, 1)}))
    DATA.mkdir(exist_ok=True)
    (DATA / f"{run.name}.jsonl").write_text("\n".join(lines) + "\n")


# Evaluations by task, or method, and seed.
Runs = dict[str, dict[str, list[dict[str, Any]]]]


def read(pattern: str) -> Runs:
    """Return the runs in the data whose file names fit a pattern."""
    runs: Runs = {}
    for path in sorted(DATA.glob(pattern)):
        task, _, seed = path.stem.rpartition("-")
        runs.setdefault(task, {})[seed] = [json.loads(line) for line in path.read_text().splitlines()]
    return runs


def draw(runs: Runs) -> None:
    """Draw the returns of simulated robots."""
    columns = 2 if len(runs) > 1 else 1
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, (task, seeds) in zip(axes.flat, runs.items(), strict=False):
        for seed, lines in seeds.items():
            axis.plot([line["steps"] / 1e6 for line in lines], [line["eval_return"] for line in lines], label=seed)
        axis.set(title=task, xlabel="million environment steps", ylabel="return of the centre")
        axis.legend(title="seed")
        axis.grid(alpha=0.3)
    figure.savefig(PICTURES / "mujoco.png", dpi=90)
    plt.close(figure)


def draw_larger_number(runs: Runs) -> None:
    """Draw the accuracy of the language model over generations, and over processor time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
    names = {
        "larger-number-es-0.4": "evolution strategies, learning rate 0.4",
        "larger-number-es-1.0": "learning rate 1.0",
        "larger-number-es-1.5": "learning rate 1.5, falling to 0.15",
        "larger-number-grpo": "GRPO, LoRA adapters",
    }
    for color, (method, seeds) in enumerate(runs.items()):
        for i, (_, *lines) in enumerate(seeds.values()):
            # The first line has the options.
            label = names[method] if i == 0 else None
            for axis, x in zip(axes, ("generation", "cpu_seconds"), strict=True):
                axis.plot(
                    [line[x] for line in lines], [line["exact"] for line in lines], color=f"C{color}", label=label
                )
    axes[0].set(xlabel="generation", ylabel="right answers to held-out prompts")
    axes[1].set(xlabel="processor seconds, one thread")
    axes[0].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(PICTURES / "larger-number.png", dpi=90)
    plt.close(figure)


def main() -> None:
    for run in sys.argv[1:]:
        keep(Path(run))
    draw_larger_number(read("larger-number-*.jsonl"))
    runs = read("*-v[0-9]-*.jsonl")
    draw(runs)
    for task, seeds in runs.items():
        for seed, lines in seeds.items():
            last = lines[-1]
            print(
                f"{task} {seed}: {last['eval_return']:.0f} ± {last['eval_std']:.0f} at {last['steps'] / 1e6:.1f}M,"
                f" {last['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
