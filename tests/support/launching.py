"""Python and torchrun in processes of their own, with one thread each: numbers depend on how many share a product."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from forking import COMMAND, Forked

ROOT = Path(__file__).parents[2]


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a process that imports what this one can, such as the modules of the tests."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}


def torchrun_command(processes: int, *arguments: Any, restarts: int = 0) -> list[Any]:
    options = ("--standalone", "--nproc-per-node", processes, "--max-restarts", restarts, "--monitor-interval", 0.1)
    return ["-m", "torch.distributed.run", *options, "--no-python", *COMMAND, *arguments]


@contextlib.contextmanager
def start(
    *arguments: Any, variables: Mapping[str, str] | None = None, modules: Sequence[str] = (), errors: int | None = None
) -> Iterator[Forked]:
    """Start Python with these arguments; a test that fails leaves nothing running."""
    with Forked(
        *arguments, environment={**environment(), **(variables or {})}, errors=errors, modules=modules
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                # torchrun takes its processes along, as it could not if it were killed.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=60)
                process.kill()


def python(*arguments: Any, modules: Sequence[str] = ()) -> str:
    """Run Python with these arguments and return what it printed."""
    with start(*arguments, modules=modules) as process:
        out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, out + errors
    return out


def torchrun(processes: int, *arguments: Any, modules: Sequence[str] = ()) -> str:
    return python(*torchrun_command(processes, *arguments), modules=modules)


SCRIPT = """
import os
from engine_cases import *
torch.set_num_threads(1)
rank = int(os.environ["RANK"])

def say(*words):
    # To a file of each process's own, as their lines may mix on one output.
    with open(f"{out}/said-{{rank}}", "a") as file:
        print(*words, file=file)
"""


def in_group(processes: int, *arguments: Any) -> None:
    """Run a script in processes that find what torchrun tells those that it starts."""
    # It is host to the store as well, with a port that nobody can take.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with contextlib.ExitStack() as stack:
        members = [
            stack.enter_context(start(*arguments, variables={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(processes)
        ]
        outputs = [member.communicate(timeout=300) for member in members]
    assert not any(member.returncode for member in members), outputs


def run_script(processes: int, folder: Path, body: str) -> list[list[str]]:
    """Run a script in a group of processes and return the lines that each said."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(out=folder) + body)
    in_group(processes, path)
    return [(folder / f"said-{rank}").read_text().splitlines() for rank in range(processes)]


def on_two_nodes(*arguments: Any) -> None:
    """Run a script in a process on each of two nodes, as two agents of torchrun do, both on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options: tuple[Any, ...] = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", port)
    options += ("--rdzv-endpoint", f"localhost:{port}", "--no-python", *COMMAND)
    command = ("-m", "torch.distributed.run", *options, *arguments)
    with start(*command) as one, start(*command) as other:
        outputs = [node.communicate(timeout=500) for node in (one, other)]
    assert one.returncode == other.returncode == 0, outputs
