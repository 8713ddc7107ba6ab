"""How generations scale with the processes that share them, and what a model of the costs predicts."""

from __future__ import annotations

import collections
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from .measure import ROOT
from .suites import Table

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: Any) -> str:
    """Run Python with one thread a process and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def apart(size: int, generations: int, *options: str) -> float:
    """Return the mean seconds of a generation of two runs of half as many members, at the same time."""
    command = [sys.executable, "-m", "benchmarks.one_rank", "local", str(size // 2), str(generations), *options]
    both = [subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return statistics.mean(json.loads(process.communicate()[0])["seconds"] for process in both)


def one_rank(processes: int, exchange: str, size: int, generations: int, *options: str) -> dict[str, Any]:
    command = ("-m", "benchmarks.one_rank", exchange, size, generations, *options)
    if processes == 1:
        return json.loads(run(*command))
    return json.loads(run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *command))


def processes(quick: bool) -> Table:
    """W1 shared among processes of one thread each."""
    size, generations, rounds = (2048, 2, 1) if quick else (4096, 12, 4)
    table = Table(
        f"Processes: W1, N = {size}, one thread each",
        "Generations shared among processes of torch.distributed (gloo) on one machine: seconds of a generation,"
        f" medians of {rounds} starts of {generations} generations, the kinds in turn; bytes that each process hands"
        " over in a generation. The model: chunks of the busiest process times noise, forward and update, plus the"
        f" step. Two runs of {size // 2} members that have nothing to do with each other show what the machine allows.",
        ["what", "processes", "seconds", "times as fast", "model's seconds", "bytes"],
    )
    kinds = {"eager": [(1, "local"), (2, "scores"), (2, "sums"), (2, "auto"), (4, "sums")]}
    kinds["compiled"] = [(1, "local"), (2, "sums")]
    results: dict[tuple[str, tuple[int, str]], list[dict[str, Any]]] = collections.defaultdict(list)
    unrelated = collections.defaultdict(list)
    for _ in range(rounds):
        for how, own in kinds.items():
            options = ["compile"] * (how == "compiled")
            for kind in own:
                results[how, kind].append(one_rank(*kind, size, generations, *options))
            unrelated[how].append(apart(size, generations, *options))
    for how, own in kinds.items():
        alone = results[how, (1, "local")]
        base = statistics.median(r["seconds"] for r in alone)
        part = {
            name: statistics.median(r[name] for r in alone) for name in ("noise", "noise and forward", "update", "step")
        }
        times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in part.items())
        table.text += f" Measured for a chunk of 1,024 members, {how}: {times}."
        for count, exchange in own:
            measured = results[how, (count, exchange)]
            seconds = statistics.median(r["seconds"] for r in measured)
            table.rows.append(
                {
                    "what": f"{how}, " + ("one process" if count == 1 else f"exchange of {exchange}"),
                    "processes": count,
                    "seconds": f"{seconds:.3f}",
                    "times as fast": f"{base / seconds:.2f}",
                    "model's seconds": f"{predicted(part, size // 1024, count, exchange):.3f}",
                    "bytes": f"{measured[0]['bytes']:,.0f}",
                }
            )
        limit = statistics.median(unrelated[how])
        table.rows.append(
            {
                "what": f"{how}, two runs apart, half the members each",
                "processes": 2,
                "seconds": f"{limit:.3f}",
                "times as fast": f"{base / limit:.2f}",
            }
        )
    table.bars = {f"{row['processes']} × {row['what']}": float(row["seconds"]) * 1e3 for row in table.rows}
    return table


def predicted(part: dict[str, float], chunks: int, count: int, exchange: str) -> float:
    """Return the seconds of a generation that the parts of a chunk's work come to."""
    # On two cores, four processes take turns.
    mine = -(-chunks // min(count, os.cpu_count() or 1))
    updates = (chunks if exchange == "scores" else mine) * part["update"]
    drawn_again = (chunks - mine) * part["noise"] if exchange == "scores" else 0.0
    return mine * part["noise and forward"] + drawn_again + updates + part["step"]


def ray(quick: bool) -> Table:
    """A fitness of a millisecond a member on Ray's workers."""
    rounds = 1 if quick else 3
    table = Table(
        "Ray: a fitness of 1 ms a member, N = 1024",
        f"Seconds of a generation in chunks of 64, medians of {rounds} starts of 6 generations, one thread a worker.",
        ["what", "seconds", "times as fast as one worker"],
    )
    seconds: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(rounds):
        for workers, measured in seconds.items():
            measured.append(float(run("-m", "benchmarks.one_ray", workers)))
    one = statistics.median(seconds[1])
    for workers, measured in seconds.items():
        median = statistics.median(measured)
        name = f"{workers} worker{'s' * (workers > 1)}" if workers else "this process alone"
        table.rows.append(
            {"what": name, "seconds": f"{median:.3f}", "times as fast as one worker": f"{one / median:.2f}"}
        )
        table.bars[name] = median * 1e3
    return table
