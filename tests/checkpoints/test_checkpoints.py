"""Checkpoint files: whole or not there, read without running code, refused where they do not fit."""

from __future__ import annotations

import functools
import os
import pickle
import random
import re
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_same,
    goes_on,
    make,
    network,
    start_python,
)
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
)

from eggroll_trainer import ESTrainer, VanillaESTrainer


def same_as_before(path: Path, content: bytes) -> bool:
    """Whether a folder holds this file, as it was, and nothing else."""
    return path.read_bytes() == content and list(path.parent.iterdir()) == [path]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def saved(path: Path) -> ESTrainer:
    trainer = make()
    trainer.train(2, verbose=False)
    trainer.save(path)
    return trainer


def refuses(path: Path, text: str, error: type[Exception] = ValueError, **options: Any) -> None:
    trainer, twin = make(**options), make(**options)
    goes_on(trainer, twin)
    with pytest.raises(error, match=text):
        trainer.load(path)
    goes_on(trainer, twin)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_truncated_checkpoints(share: float, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    saved(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuses(path, re.escape(f"{path} is damaged or not a checkpoint"))


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    saved(path)
    content = bytearray(path.read_bytes())
    # In the middle of the weights.
    at = content.find(make().initial_params[:4].numpy().tobytes())
    assert at > 0
    content[at + 2] ^= 1
    path.write_bytes(content)
    refuses(path, "is damaged or not a checkpoint")


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(random.Random(seed).randbytes(5000))
    refuses(path, "is damaged or not a checkpoint")


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, legacy", "inside a state"])
def test_checkpoints_run_no_code(form: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "run.pt", tmp_path / "trace"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "settings": Evil(trace)}))
    elif form == "inside a state":
        torch.save({**make().state_dict(), "history": Evil(trace)}, path)
    else:
        torch.save(Evil(trace), path, _use_new_zipfile_serialization=form == "torch")
    refuses(path, "was not loaded: it could run code|is damaged or not a checkpoint")
    assert not trace.exists()
    # The file would have: the test tests something.
    if form == "inside a state":
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_other_files_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for value in (network().state_dict(), torch.ones(3), {"format": torch.ones(3)}, [1], {"format": 1}):
        torch.save(value, path)
        refuses(path, "is not the state of a trainer|is incomplete or damaged|has format tensor")
    torch.save({**make().state_dict(), "format": 2}, path)
    refuses(
        path, "run.pt has format 2 and this version of eggroll_trainer reads format 1: use the version that wrote it"
    )


def test_missing_files_and_folders(tmp_path: Path) -> None:
    refuses(tmp_path / "none.pt", "none.pt", FileNotFoundError)
    refuses(tmp_path, "directory", IsADirectoryError)
    trainer, twin = make(), make()
    with pytest.raises(FileNotFoundError):
        trainer.save(tmp_path / "missing" / "run.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        trainer.save(tmp_path / "file" / "run.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        trainer.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    goes_on(trainer, twin)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    trainer = saved(path)
    content = path.read_bytes()
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            trainer.save(path)
        assert same_as_before(path, content)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_failures_while_saving(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    trainer = saved(path)
    content = path.read_bytes()
    trainer.step()

    def half(state: Any, file: Any, **options: Any) -> None:
        file.write(content[: len(content) // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(type(error)):
            trainer.save(path)
    assert same_as_before(path, content)
    trainer.save(path)
    again = make()
    again.load(path)
    assert_same(again.state_dict(), trainer.state_dict())


def test_states_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    class Remembering(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            super().step()
            self.state[self.param_groups[0]["params"][0]]["who"] = Path("x")

    path = tmp_path / "run.pt"
    saved(path)
    content = path.read_bytes()
    trainer = make(optimizer=Remembering)
    trainer.step()
    with pytest.raises(TypeError, match="the state holds .*Path.*, which could not be loaded without running code"):
        trainer.save(path)
    assert same_as_before(path, content)


def wider() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 2))


def with_buffer(size: int) -> nn.Sequential:
    model = network()
    model.register_buffer("scale", torch.ones(size))
    return model


def reordered() -> dict[str, Any]:
    model = network()
    return {"model": model, "params": list(model.parameters())[::-1]}


def grouped() -> dict[str, Any]:
    model = network()
    return {"model": model, "params": [{"params": model[0].parameters()}, {"params": model[3].parameters()}]}


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "model": (
        lambda: {"model": wider()},
        r"the checkpoint is of another model: 3 parameters or buffers differ, the first is '0.weight' with shape"
        r" \(8, 4\) in the file and \(16, 4\) in the model",
    ),
    "more layers": (
        lambda: {"model": network().append(nn.Linear(2, 2))},
        r"2 parameters or buffers differ, the first is '4.weight' with shape missing in the file and \(2, 2\) in the",
    ),
    "buffers": (
        lambda: {"model": with_buffer(3)},
        r"is 'scale' with shape missing in the file and \(3,\) in the model",
    ),
    "order": (reordered, r"the checkpoint has the parameter groups \[\['0.weight'.* this trainer has \[\['3.bias'"),
    "groups": (grouped, r"the checkpoint has the parameter groups .* this trainer has"),
    "optimizer": (
        lambda: {"optimizer": torch.optim.AdamW},
        "the checkpoint is of another kind of trainer; this one has optimizer='AdamW' \\(was 'Adam'\\)",
    ),
    "default optimizer": (lambda: {"optimizer": None}, "optimizer='SGD' \\(was 'Adam'\\)"),
    "trainer": (lambda: {"cls": VanillaESTrainer}, "trainer='VanillaESTrainer' \\(was 'EGGROLLTrainer'\\)"),
    "lr_scheduler": (
        lambda: {"lr_scheduler": functools.partial(CosineAnnealingLR, T_max=9)},
        "lr_scheduler='CosineAnnealingLR' \\(was 'NoneType'\\)",
    ),
    "sigma_scheduler": (
        lambda: {"sigma_scheduler": functools.partial(ExponentialLR, gamma=0.9)},
        "sigma_scheduler='ExponentialLR' \\(was 'NoneType'\\)",
    ),
}


@pytest.mark.parametrize("row", OTHERS)
def test_checkpoints_of_others(row: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    saved(path)
    options, text = OTHERS[row]
    trainer = make(**options())
    trainer.step()
    before = trainer.state_dict()
    with pytest.raises(ValueError, match=text):
        trainer.load(path)
    assert_same(trainer.state_dict(), before)
    trainer.step()


def test_states_that_fail_while_they_are_restored() -> None:
    trainer, twin = make(), make()
    goes_on(trainer, twin)
    state = make().state_dict()
    state["centre"]["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="the state does not fit this trainer: ValueError"):
        trainer.load_state_dict(state)
    goes_on(trainer, twin)
    state = make().state_dict()
    state["initial_params"] = "gone"
    with pytest.raises(ValueError, match="the state does not fit this trainer: AttributeError"):
        trainer.load_state_dict(state)
    goes_on(trainer, twin)


def test_going_on_with_other_settings_warns() -> None:
    state = make().state_dict()
    for options, text in (
        (
            {"population_size": 16},
            r"going on with population_size=16 \(was 8\), chunk_size=16 \(was 8\): the numbers will",
        ),
        ({"chunk_size": 4}, r"chunk_size=4 \(was 8\)"),
        ({"coalesce": False}, r"coalesce=False \(was True\)"),
        ({"noise_reuse": 2}, r"noise_reuse=2 \(was 0\)"),
        ({"group_size": 4}, r"group_size=4 \(was 0\)"),
        ({"shaping": "raw"}, r"shaping='raw' \(was 'zscore'\)"),
        ({"noise": "rademacher"}, r"noise='rademacher' \(was 'gaussian'\)"),
        ({"model": network(torch.float64)}, r"dtypes=\['torch.float64'\] \(was \['torch.float32'\]\)"),
    ):
        trainer = make(**options)
        with pytest.warns(RuntimeWarning, match=text):
            trainer.load_state_dict(state)
    with warnings.catch_warnings():
        # Larger than the population: the same single chunk.
        warnings.simplefilter("error")
        make(chunk_size=100).load_state_dict(state)


def test_files_have_ordinary_modes(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "run.pt"
    mask = os.umask(0o027)
    try:
        trainer.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        # One that exists keeps its own, as a file that is written over does.
        path.chmod(0o600)
        trainer.save(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(mask)
    assert list(tmp_path.iterdir()) == [path]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "latest.pt", tmp_path / "disk" / "run.pt"
    link.symlink_to(target)
    trainer, again = make(), make()
    for _ in range(2):
        trainer.step()
        trainer.save(link)
        assert link.is_symlink() and not target.is_symlink()
        again.load(target)
        assert_same(again.state_dict(), trainer.state_dict())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "latest.pt", "run.pt"]


def test_paths_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, again = make(), make()
    trainer.step()
    trainer.save("run.pt")
    again.load("run.pt")
    assert_same(again.state_dict(), trainer.state_dict())


def save_and_be_killed(folder: str) -> None:
    """Run in a process of its own: fork children that save in a loop, kill them, and look at what they leave."""
    # A forked child does not have its parent's threads, and would wait for them.
    torch.set_num_threads(1)
    path, delays = Path(folder) / "run.pt", random.Random(0)
    model = nn.Linear(1000, 1000)
    trainer, again = (make(model=model, fitness_fn=lambda m: 0.0) for _ in range(2))
    states = []
    for generation in range(2):
        trainer.generation = generation
        trainer.save(path)
        states.append(trainer.state_dict())
    unfinished = 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                trainer.generation = 1 - trainer.generation
                trainer.save(path)
        time.sleep(delays.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        again.load(path)
        assert_same(again.state_dict(), states[again.generation])
        unfinished += len(list(path.parent.glob(".run.pt.*.tmp")))
        for leftover in path.parent.glob(".run.pt.*.tmp"):
            leftover.unlink()
    print(unfinished)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_while_saving(tmp_path: Path) -> None:
    with start_python("test_checkpoints.save_and_be_killed", tmp_path) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    # Nearly all of a child's time goes into writing: of ten, some are killed in the middle of it.
    assert int(output) > 0
