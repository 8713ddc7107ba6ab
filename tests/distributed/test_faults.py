"""Kills, hangs, full disks: real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CASES, at_once, make
from helpers import assert_same
from launching import python, start, torchrun_command
from ray_cluster import Cluster
from torch import Tensor

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.callbacks import Checkpoints, ScoreLog
from eggroll_trainer.checkpoints.files import read_checkpoint
from eggroll_trainer.distributed import LocalEngine

GENERATIONS = 40


def quiet() -> Any:
    trainer = make(EGGROLLTrainer, LocalEngine(), optimizer=torch.optim.Adam, learning_rate=0.01)
    trainer.train(GENERATIONS, verbose=False)
    return trainer


# A run that goes on from its checkpoints, with generations long enough to be hit.
RUN = """
import os, time
from engine_cases import *
from eggroll_trainer.callbacks import Checkpoints
torch.set_num_threads(1)

@batched
def slow(population):
    time.sleep({nap})
    return at_once(population)

trainer = make(EGGROLLTrainer, None, fitness_fn=slow, optimizer=torch.optim.Adam, learning_rate=0.01)
checkpoints = Checkpoints({folder!r}, every=3)
checkpoints.restore(trainer)
with open({folder!r} + "-pids", "a") as file:
    print(os.getpid(), file=file)
trainer.train({generations} - trainer.generation, verbose=False, checkpoints=checkpoints)
if trainer.engine.rank == 0:
    print("checksum", trainer.checksum(), flush=True)
"""


def run_of(folder: Path, nap: float = 0.02) -> Path:
    path = folder.parent / f"{folder.name}.py"
    path.write_text(RUN.format(folder=str(folder), generations=GENERATIONS, nap=nap))
    return path


def pids(folder: Path) -> list[int]:
    path = Path(f"{folder}-pids")
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_processes_of_torchrun(kills: int, tmp_path: Path) -> None:
    folder, choose, killed = tmp_path / "run", random.Random(kills), 0
    # Three chunks in a row: 40 generations take about 2.4 s for two kills, 24 s for twenty.
    command = torchrun_command(2, run_of(folder, nap=0.01 * kills), restarts=kills)
    # No pipe: nobody reads what so many restarts have to say.
    with open(tmp_path / "errors", "w+") as errors, start(*command, errors=errors.fileno()) as process:
        for i in range(kills):
            # Each start of the group adds two processes.
            wait_until(lambda count=2 * (i + 1): len(pids(folder)) >= count or process.poll() is not None)  # type: ignore[misc]
            time.sleep(choose.uniform(0, 0.8))
            if process.poll() is None and len(pids(folder)) == 2 * (i + 1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(choose.choice(pids(folder)[-2:]), signal.SIGKILL)
                    killed += 1
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (tmp_path / "errors").read_text()
    assert f"checksum {quiet().checksum()}" in out
    assert killed >= kills // 2 and len(pids(folder)) > 2


def test_frozen_weights_reach_rays_workers_when_they_change(cluster: Cluster, tmp_path: Path) -> None:
    body = """
from engine_cases import *
model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
trainer = EGGROLLTrainer(model[0].parameters(), model, lambda m: m[1].bias[0] + m[2].running_mean[0], engine=ENGINE,
                         population_size=8, chunk_size=4, sigma=0.1, learning_rate=0.1)
references = []
for bias, mean in ((1.0, 0.0), (1.0, 0.0), (2.0, 0.0), (2.0, 0.5), (float("nan"), 0.5)):
    with torch.no_grad():
        model[1].bias.data[0] = bias  # which PyTorch does not count as a change
        model[2].running_mean[0] = mean
    try:
        print("score", trainer.step()["mean_fitness"])
    except ValueError:
        print("score none")
    references.append(ENGINE._untrained)
print("sent", len(set(references)), references[0] == references[1])
"""
    scores = [f"score {score}" for score in (1.0, 1.0, 2.0, 2.5, "none")]
    assert cluster.run(tmp_path, body) == [*scores, "sent 4 True"]


def test_a_straggler_is_given_out_twice_and_workers_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    body = f"""
import os, time
from pathlib import Path
from engine_cases import *
folder = Path({str(tmp_path)!r}) / "late"
folder.mkdir()

@batched
def late(population):
    if population.generation == 2 and population.first == 12 and not [*folder.iterdir()]:
        (folder / str(os.getpid())).touch()
        time.sleep(60)
    return at_once(population)

trainer = make(EGGROLLTrainer, ENGINE, fitness_fn=late)
trainer.train(2, verbose=False)
start = time.monotonic()
trainer.train(1, verbose=False)
# Another function takes the place of the first in the workers as well. The first worker to leave is the late one.
trainer.fitness_fn = at_once
for ENGINE.workers in (1, 2):
    trainer.step()
    print("workers", len(ENGINE._actors))
print("late", time.monotonic() - start < 30, len([*folder.iterdir()]))
print("checksum", trainer.checksum())
"""
    twin = make(EGGROLLTrainer, LocalEngine())
    twin.train(5, verbose=False)
    said = ["workers 1", "workers 2", "late True 1", f"checksum {twin.checksum()}"]
    assert cluster.run(tmp_path, body) == said


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_workers_of_ray(kills: int, cluster: Cluster, tmp_path: Path) -> None:
    # Workers kill themselves in the middle of a chunk, until there are as many marks as there shall be kills.
    marks = tmp_path / "marks"
    marks.mkdir()
    body = f"""
import os, random, signal
from engine_cases import *

@batched
def deadly(population):
    scores = at_once(population)
    marks = os.listdir({str(marks)!r})
    if len(marks) < {kills} and random.random() < 0.2:
        open({str(marks)!r} + f"/{{os.getpid()}}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return scores

ENGINE.retries = 20
trainer = make(EGGROLLTrainer, ENGINE, fitness_fn=deadly, optimizer=torch.optim.Adam, learning_rate=0.01)
trainer.train({GENERATIONS}, verbose=False)
print("checksum", trainer.checksum())
"""
    assert f"checksum {quiet().checksum()}" in cluster.run(tmp_path, body)
    assert len([*marks.iterdir()]) >= kills


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_leaves_a_checkpoint_and_the_next_start_resumes(processes: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = run_of(folder)
    checkpoints = Checkpoints(folder)
    with start(*([script] if processes == 1 else torchrun_command(2, script))) as process:
        wait_until(lambda: len(checkpoints.paths()) >= 2)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert "checksum" not in out
    if processes == 1:
        assert process.returncode == 143 and "Traceback" not in errors
    # At the generation where it was, not only at every third.
    logged = list(ScoreLog(folder / "scores.jsonl").generations())
    assert checkpoints.paths()[-1].name == f"checkpoint-{logged[-1].number:08d}.pt"
    assert f"checksum {quiet().checksum()}" in python(script)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    trainer = make(EGGROLLTrainer, LocalEngine())
    checkpoints = Checkpoints(tmp_path / "run", every=2)
    trainer.train(2, verbose=False, checkpoints=checkpoints)
    (older,) = checkpoints.paths()
    before = older.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # No file may grow beyond half of a checkpoint: what a full disk looks like to who writes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.warns(UserWarning, match="generation 4 was not written"), pytest.raises(OSError):
            trainer.train(2, verbose=False, checkpoints=checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert trainer.generation == 4
    assert checkpoints.paths() == [older] and older.read_bytes() == before
    assert not [*(tmp_path / "run").glob("*.tmp")]
    # With room again, training and writing go on.
    trainer.train(2, verbose=False, checkpoints=checkpoints)
    assert [path.name for path in checkpoints.paths()] == [older.name, "checkpoint-00000006.pt"]


def test_truncated_checkpoints_are_never_resumed_from(tmp_path: Path) -> None:
    trainer, checkpoints = CASES["everything"](LocalEngine()), Checkpoints(tmp_path / "run", every=1, log=False)
    trainer.train(3, verbose=False, checkpoints=checkpoints)
    *_, second, newest = checkpoints.paths()
    whole, choose = newest.read_bytes(), random.Random(0)
    states = {}
    for path in (second, newest):
        reference = CASES["everything"](LocalEngine())
        reference.load(path)
        states[path] = reference.state_dict()
    for size in [0, 1, len(whole) - 1, *(choose.randrange(len(whole)) for _ in range(97))]:
        newest.write_bytes(whole[:size])
        other = CASES["everything"](LocalEngine())
        with pytest.warns(UserWarning, match="taking the checkpoint before it"):
            assert checkpoints.restore(other)
        assert_same(other.state_dict(), states[second])
    newest.write_bytes(whole)
    assert checkpoints.restore(other) and other.generation == 3
    assert_same(other.state_dict(), states[newest])


def test_no_checkpoint_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    trainer, checkpoints = make(EGGROLLTrainer, LocalEngine()), Checkpoints(tmp_path / "run", every=1)
    trainer.train(2, verbose=False, checkpoints=checkpoints)
    for path in checkpoints.paths():
        path.write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoints.restore(make(EGGROLLTrainer, LocalEngine()))


class Hangs:
    """Sleeps in the first evaluations of the third generation's second chunk."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times
        batched(self)

    def __call__(self, population: Population) -> Tensor:
        if population.generation == 2 and population.first == 12:
            tries = len([*self.folder.iterdir()])
            if tries < self.times:
                (self.folder / f"{tries}-{os.getpid()}").touch()
                # What a fitness function catches is its own affair.
                with contextlib.suppress(Exception):
                    time.sleep(60)
        return at_once(population)


def test_a_fitness_that_hangs_is_tried_again(tmp_path: Path) -> None:
    trainer = make(EGGROLLTrainer, LocalEngine(timeout=0.3), fitness_fn=Hangs(tmp_path, 2))
    trainer.train(4, verbose=False)
    twin = make(EGGROLLTrainer, LocalEngine())
    twin.train(4, verbose=False)
    assert trainer.checksum() == twin.checksum() and trainer.history == twin.history


def test_a_fitness_that_hangs_always_is_an_error(tmp_path: Path) -> None:
    fitness = Hangs(tmp_path, 3)
    trainer = make(EGGROLLTrainer, LocalEngine(timeout=0.3, retries=2), fitness_fn=fitness)
    with pytest.raises(TimeoutError, match=r"fitness of members 12-23 of generation 3 took longer .* 0.3 s, 3 times"):
        trainer.train(4, verbose=False)
    assert trainer.generation == 2
    trainer.train(2, verbose=False)
    twin = make(EGGROLLTrainer, LocalEngine())
    twin.train(4, verbose=False)
    assert trainer.checksum() == twin.checksum()


def test_hangs_in_ray(cluster: Cluster, tmp_path: Path) -> None:
    body = f"""
import time
from pathlib import Path
from engine_cases import *
from test_faults import Hangs
folder = Path({str(tmp_path)!r})
(folder / "once").mkdir(), (folder / "always").mkdir()
# New workers import the tests in the time limit, which takes longer on a busy machine.
ENGINE.close()
began = time.monotonic()
make(EGGROLLTrainer, ENGINE).step()
ENGINE.timeout = max(5, 2 * (time.monotonic() - began))
trainer = make(EGGROLLTrainer, ENGINE, fitness_fn=Hangs(folder / "once", 1))
trainer.train(4, verbose=False)
print("checksum", trainer.checksum())
ENGINE.retries = 1
trainer = make(EGGROLLTrainer, ENGINE, fitness_fn=Hangs(folder / "always", 9))
try:
    trainer.train(4, verbose=False)
except TimeoutError as error:
    print(error)
# The last one that was given the chunk hangs still.
ENGINE.close()
"""
    checksum, message = cluster.run(tmp_path, body)
    twin = make(EGGROLLTrainer, LocalEngine())
    twin.train(4, verbose=False)
    assert checksum == f"checksum {twin.checksum()}"
    assert "the fitness of members 12-23 of generation 3 took longer" in message and "2 times" in message


def test_a_hang_in_native_code_restarts_the_group(tmp_path: Path) -> None:
    body = f"""
from pathlib import Path
from engine_cases import *
from eggroll_trainer.callbacks import Checkpoints
from eggroll_trainer.distributed import ProcessGroupEngine
torch.set_num_threads(1)
mark = Path({str(tmp_path / "mark")!r})

@batched
def stuck(population):
    if population.generation == 3 and population.first == 36 and not mark.exists():
        mark.touch()
        # One operation that takes minutes and does not look for signals.
        3 ** 10**9
    return at_once(population)

engine = ProcessGroupEngine(timeout=1)
trainer = make(EGGROLLTrainer, engine, fitness_fn=stuck)
checkpoints = Checkpoints({str(tmp_path / "run")!r}, every=1)
checkpoints.restore(trainer)
trainer.train(5 - trainer.generation, verbose=False, checkpoints=checkpoints)
if trainer.is_main:
    print("checksum", trainer.checksum())
"""
    (tmp_path / "script.py").write_text(body)
    out = python(*torchrun_command(2, tmp_path / "script.py", restarts=1))
    twin = make(EGGROLLTrainer, LocalEngine())
    twin.train(5, verbose=False)
    assert (tmp_path / "mark").exists() and f"checksum {twin.checksum()}" in out


def test_a_run_is_repeated_from_its_scores(tmp_path: Path) -> None:
    for name in ("everything", "coalesced", "custom", "cheetah"):
        trainer, checkpoints = CASES[name](LocalEngine()), Checkpoints(tmp_path / name, every=4)
        trainer.train(5, verbose=False, checkpoints=checkpoints)
        at_five = trainer.checksum()
        if name != "cheetah":
            trainer.sigma = 0.02
        trainer.train(4, verbose=False, checkpoints=checkpoints)
        log, again = ScoreLog(tmp_path / name / "scores.jsonl"), CASES[name](LocalEngine())
        again.fitness_fn = None
        assert log.replay(again, until=5) == 5 and again.checksum() == at_five
        assert log.replay(again) == 9 and again.checksum() == trainer.checksum()
        assert again.history == trainer.history
        assert_same(dict(again.model.named_buffers()), dict(trainer.model.named_buffers()))
        assert torch.equal(
            torch.cat([p.flatten() for p in again.get_best_model().parameters()]),
            torch.cat([p.flatten() for p in trainer.get_best_model().parameters()]),
        )


def test_a_log_is_small_and_says_what_is_wrong(tmp_path: Path) -> None:
    trainer, checkpoints = make(EGGROLLTrainer, LocalEngine(), population_size=600), Checkpoints(tmp_path, every=9)
    trainer.train(4, verbose=False, checkpoints=checkpoints)
    log = ScoreLog(tmp_path / "scores.jsonl")
    # Eight bytes a score as base64, and a line's frame.
    assert log.path.stat().st_size < 4 * (600 * 8 * 4 / 3 + 300) + 1000
    lines = log.path.read_text().splitlines()
    with pytest.raises(ValueError, match="ends at generation 4, before 6"):
        log.replay(make(EGGROLLTrainer, LocalEngine(), population_size=600), until=6)
    with pytest.raises(ValueError, match="other settings; this trainer has chunk_size=6"):
        log.replay(make(EGGROLLTrainer, LocalEngine(), population_size=600, chunk_size=6))
    other = make(EGGROLLTrainer, LocalEngine(), population_size=600)
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="other initial weights"):
        log.replay(other)
    # A line that was cut off, or changed, ends the log.
    for damaged in (lines[3][:-9], lines[3].replace('"seed": 3', '"seed": 4')):
        log.path.write_text("\n".join([*lines[:3], damaged]))
        assert log.replay(make(EGGROLLTrainer, LocalEngine(), population_size=600)) == 2
    log.path.write_text("[1]\n")
    with pytest.raises(ValueError, match="not a score log"):
        log.replay(other)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    trainer, checkpoints = make(EGGROLLTrainer, LocalEngine()), Checkpoints(tmp_path, every=2, keep_last=2)
    trainer.train(9, verbose=False, checkpoints=checkpoints)
    assert [path.name[-6:-3] for path in checkpoints.paths()] == ["008", "009"]
    best = read_checkpoint(tmp_path / "best.pt")["history"]["mean_fitness"]
    saved = [trainer.history["mean_fitness"][generation - 1] for generation in (2, 4, 6, 8, 9)]
    assert best[-1] == max(saved)
    # A new object, as after a restart, knows the best.
    again = Checkpoints(tmp_path, every=2, keep_last=2)
    assert again._best_fitness() == max(saved)


def test_a_folder_with_another_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    make(EGGROLLTrainer, LocalEngine()).train(1, verbose=False, checkpoints=checkpoints)
    with pytest.raises(FileExistsError, match="holds a run already"):
        make(EGGROLLTrainer, LocalEngine()).train(1, verbose=False, checkpoints=checkpoints)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="another model"):
        checkpoints.restore(make(EGGROLLTrainer, LocalEngine(), model=torch.nn.Linear(6, 3)))
