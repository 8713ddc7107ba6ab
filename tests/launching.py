"""Python and torchrun in processes of their own, with one thread each: numbers depend on how many share a product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def torchrun_command(processes: int, *arguments: Any, restarts: int = 0) -> list[Any]:
    options = ("--standalone", "--nproc-per-node", processes, "--max-restarts", restarts, "--monitor-interval", 0.1)
    return ["-m", "torch.distributed.run", *options, *arguments]


def start(*arguments: Any, errors: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        # Ray's workers look for modules where the script is, and here.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS / 'distributed'}"},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def python(*arguments: Any) -> str:
    """Run Python with these arguments and return what it printed."""
    process = start(*arguments)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, out + errors
    return out


def torchrun(processes: int, *arguments: Any) -> str:
    return python(*torchrun_command(processes, *arguments))
