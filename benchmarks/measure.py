"""Timing, memory and surroundings of a measurement."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, fewer: Mapping[str, int] | None = None, warmup: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of ``repeats`` runs of each, one of every kind in turn.

    Args:
        runs: What to time.
        repeats: How often.
        fewer: For those that take long, how often instead.
        warmup: Runs of each before the first that counts.
    """
    fewer = fewer or {}
    for name, run in runs.items():
        for _ in range(warmup if name not in fewer else 1):
            timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name, run in runs.items():
            if i < fewer.get(name, repeats):
                seconds[name].append(timed(run))
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that one run takes, an accelerator's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_new_process(module: str, *arguments: object) -> str:
    """Run ``python -m module arguments…`` and return what it prints: for peaks of memory."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def peak_memory() -> int:
    """Return the most bytes that this process has held at one time."""
    return _status("VmHWM")


def settled_memory() -> int:
    """Free what is not in use, count the peak of memory from now on, and return the bytes that this process holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    restart_peak()
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def restart_peak() -> None:
    """Count the peak of memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def surroundings() -> dict[str, Any]:
    """Return what a figure has to be read with: date, hardware, versions, commit and command."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = (
        "torch",
        "numpy",
        "greenlet",
        "transformers",
        "eggroll-es",
        "evotorch",
        "evosax",
        "evox",
        "jax",
        "jaxlib",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "command": " ".join(["python", "-m", _main_module(), *sys.argv[1:]]),
    }


def _main_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
