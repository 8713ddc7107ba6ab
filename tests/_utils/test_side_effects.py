"""What a run changes in the process is undone when it is over: docs/user-guide/side-effects.md, row by row."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import fitness, make, start_python
from surroundings import surroundings
from torch import nn

from eggroll_trainer._utils.memory import _c_library, freed_memory_kept
from eggroll_trainer.callbacks import Checkpoints
from eggroll_trainer.distributed import LocalEngine
from eggroll_trainer.fitness.together import deadlock
from eggroll_trainer.noise import bits

PAGE = Path(__file__).parents[2] / "docs" / "user-guide" / "side-effects.md"


class Effect(NamedTuple):
    """Something that is another one while members are evaluated.

    Attributes:
        get: Returns what it is now.
        timeout: The engine's.
        checkpoints: Whether the run writes any.
    """

    get: Callable[[], Any]
    timeout: float | None = None
    checkpoints: bool = False


EFFECTS = {
    "automatic garbage collection": Effect(gc.isenabled),
    "intra-op threads": Effect(torch.get_num_threads),
    "handler of SIGINT": Effect(lambda: signal.getsignal(signal.SIGINT)),
    "handler of SIGALRM and its timer": Effect(
        lambda: (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0), timeout=60.0
    ),
    "handler of SIGTERM": Effect(lambda: signal.getsignal(signal.SIGTERM), checkpoints=True),
    "handler of SIGURG": Effect(lambda: signal.getsignal(signal.SIGURG)),
    "`sys.unraisablehook`": Effect(lambda: sys.unraisablehook),
    "global random generators": Effect(
        lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore
    ),
    "stance of `torch.compile`": Effect(lambda: torch._dynamo.eval_frame._stance.stance),
}
# Others that have a test of their own below.
OTHERS = ["glibc's allocator", "a thread that finds deadlocks", "filters of warnings", "`MUJOCO_GL`"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_it_is_undone(name: str, fails: bool, tmp_path: Path) -> None:
    get, timeout, checkpoints = EFFECTS[name]
    seen = []

    def plain(model: nn.Module) -> float:
        score = fitness(model)
        seen.append(get())
        if fails:
            raise KeyError
        return score

    trainer = make(fitness_fn=plain, engine=LocalEngine(timeout=timeout))
    options = {"checkpoints": Checkpoints(tmp_path)} if checkpoints else {}
    # All of it, not what is looked at alone.
    before, around = get(), surroundings()
    try:
        trainer.train(1, verbose=False, **options)
    except KeyError:
        assert fails
    # Members are evaluated alone as well, to be compared.
    assert any(value != before for value in seen)
    assert get() == before and surroundings() == around


def kept_memory() -> None:
    """Run in a process of its own: print what stays of 180 MB that are freed, in the block and after it."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    def use(megabytes: int, times: int) -> None:
        # Without anything between them, which would keep the end of the heap.
        blocks = [library.malloc(megabytes << 20) for _ in range(times)]
        for block in blocks:
            ctypes.memset(block, 1, megabytes << 20)
        for block in blocks:
            library.free(block)

    before = resident()
    with freed_memory_kept():
        with freed_memory_kept():
            pass
        use(30, 6)
        inside = resident() - before
    # Memory is handed back when something more is freed.
    use(1, 1)
    print(inside, resident() - before)


@pytest.mark.skipif(_c_library() is None, reason="another allocator, or one that was told what to keep")
def test_memory_that_is_freed_is_kept_in_the_block_alone() -> None:
    with start_python("test_side_effects.kept_memory") as process:
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    inside, after = map(int, printed.split())
    assert inside >= 170 and after <= 70


def test_the_thread_that_finds_deadlocks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlock, "_STAY", 0.2)

    def found() -> bool:
        return any(thread.name == "eggroll-deadlock" for thread in threading.enumerate())

    def plain(model: nn.Module) -> float:
        seen.append(found())
        return fitness(model)

    for _ in range(2):
        seen: list[bool] = []
        make(fitness_fn=plain).step()
        assert seen and all(seen)
        # One that began in an earlier test may stay for as long as it said then.
        end = time.monotonic() + 10
        while found():
            assert time.monotonic() < end
            time.sleep(0.02)


def test_warnings_of_what_is_compiled_are_silenced_for_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> None:
        warnings.warn("of torch's own", stacklevel=1)

    monkeypatch.setattr(bits, "_compiled", lambda function: compiled)
    before = list(warnings.filters)
    assert bits._run_compiled(compiled)
    assert warnings.filters == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is chosen")
@pytest.mark.parametrize("fails", [False, True])
def test_the_renderer_is_chosen_in_the_block_alone(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    from eggroll_trainer.rl import video

    monkeypatch.setattr(video.ctypes.util, "find_library", lambda name: name)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    before = dict(os.environ)
    try:
        with video.renderer_chosen():
            assert os.environ["MUJOCO_GL"] == "egl"
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert os.environ == before
    # What the user has chosen stays.
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with video.renderer_chosen():
        assert os.environ["MUJOCO_GL"] == "osmesa"
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_the_page_has_a_row_for_each() -> None:
    undone, _, _ = PAGE.read_text().partition("## What stays")
    rows = re.findall(r"^\| ([^|]+?) \|", undone, re.MULTILINE)
    assert rows[1:] == [*EFFECTS, *OTHERS]
