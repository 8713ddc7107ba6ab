"""``eggroll rl`` as it is typed: a run's folder, a run that is killed and resumed, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import Forked
from launching import start, torchrun

pytest.importorskip("gymnasium")

SMALL = (
    *("--population-size", "8", "--max-steps", "50", "--no-compile"),
    *("--eval-every", "2", "--eval-episodes", "2", "--save-every", "2"),
)
# What the command imports as it goes.
MODULES = ("eggroll_trainer.rl.command", "gymnasium.envs.mujoco", "matplotlib.pyplot", "torch.utils.tensorboard")


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[Forked]:
    with start("-m", "eggroll_trainer", *arguments, modules=MODULES) as process:
        yield process


def run(*arguments: object, status: int = 0) -> tuple[str, str]:
    """Return what a command printed to stdout and stderr."""
    with started(*arguments) as process:
        printed = process.communicate(timeout=120)
    assert process.returncode == status, printed
    return printed


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second")} for line in lines]


def test_a_run_leaves_everything(tmp_path: Path) -> None:
    # A start of Python's, as users have it: the environment variables of the renderer precede its import.
    command = [sys.executable, "-m", "eggroll_trainer", "rl", "Pendulum-v1", "--steps", "800", *SMALL]
    done = subprocess.run([*command, "--out", tmp_path / "a"], capture_output=True, text=True, check=True)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "policy.pt", "curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "centre policy:" in done.stdout and ("video:" in done.stdout or "no video:" in done.stderr)
    lines = curve(tmp_path / "a")
    assert [line["steps"] for line in lines] == [400, 800] and "eval_return" in lines[-1]


def test_killed_and_resumed_is_the_same_curve(tmp_path: Path) -> None:
    arguments = ("rl", "Hopper-v5", "--steps", 1600, *SMALL, "--no-video")
    run(*arguments, "--out", tmp_path / "whole")
    with started(*arguments, "--out", tmp_path / "killed") as killed:
        while not [*(tmp_path / "killed" / "checkpoints").glob("checkpoint-*")]:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    run(*arguments, "--out", tmp_path / "killed", "--resume")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.parametrize(("env_id", "steps"), [("CartPole-v1", 500), ("Pendulum-v1", 600)])
def test_a_resumed_run_that_draws_actions_writes_the_same_metrics(env_id: str, steps: int, tmp_path: Path) -> None:
    arguments = ("rl", env_id, "--sample", "--no-video", *SMALL, "--eval-every", 1, "--population-size", 4)
    run(*arguments, "--steps", steps, "--out", tmp_path / "whole")
    run(*arguments, "--steps", steps // 3, "--out", tmp_path / "parts")
    run(*arguments, "--steps", steps, "--out", tmp_path / "parts", "--resume")
    whole = curve(tmp_path / "whole")
    assert len(whole) > 2 and all("eval_return" in line for line in whole)
    assert curve(tmp_path / "parts") == whole


def stopped(number: int, folder: Path, arguments: tuple[object, ...], status: int) -> str:
    """Start a long run, send it a signal after its first checkpoint, and return what it said to stderr."""
    with started(*arguments, "--steps", 10**9) as process:
        while not [*(folder / "checkpoints").glob("checkpoint-*")]:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    return errors


def test_ctrl_c_leaves_a_run_to_resume(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", *SMALL, "--no-video", "--out", tmp_path / "a")
    errors = stopped(signal.SIGINT, tmp_path / "a", arguments, 130)
    assert "--resume" in errors
    steps = curve(tmp_path / "a")[-1]["steps"]
    run(*arguments, "--steps", steps + 400, "--resume")
    assert curve(tmp_path / "a")[-1]["steps"] == steps + 400


def test_processes_share_a_run(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", "--steps", 800, *SMALL, "--no-video", "--chunk-size", 2)
    run(*arguments, "--out", tmp_path / "one")
    printed = torchrun(2, "-m", "eggroll_trainer", *arguments, "--out", tmp_path / "two", modules=MODULES)
    assert printed.count("run: ") == 1
    assert curve(tmp_path / "two") == curve(tmp_path / "one")


def test_sigterm_leaves_a_run_to_resume(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", *SMALL, "--no-video", "--out", tmp_path / "a")
    errors = stopped(signal.SIGTERM, tmp_path / "a", arguments, 143)
    assert "Traceback" not in errors
    steps = curve(tmp_path / "a")[-1]["steps"]
    run(*arguments, "--steps", steps + 400, "--resume")
    assert curve(tmp_path / "a")[-1]["steps"] == steps + 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("NoSuchTask-v9",), "NoSuchTask-v9"),
        (("CartPole-v1", "--resume"), "no run to resume"),
        (("CartPole-v1", "--population-size", "0"), "population_size must be at least 1"),
        (("CartPole-v1", "--shaping", "best"), "shaping"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    _, errors = run("rl", *arguments, "--out", tmp_path / "a", status=1)
    assert message in errors and "Traceback" not in errors


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", "--steps", 400, *SMALL, "--no-video", "--out", tmp_path / "a")
    run(*arguments)
    _, taken = run(*arguments, status=1)
    assert "holds a run already" in taken
    _, changed = run(*arguments, "--resume", "--sigma", 0.7, status=1)
    assert "sigma=0.7 (was 0.1)" in changed


def test_help_lists_the_options() -> None:
    # With the task's own defaults, wherever its name stands.
    for arguments in (("HalfCheetah-v5", "--help"), ("--seed", 1, "HalfCheetah-v5", "--help")):
        shown, _ = run("rl", *arguments)
        assert "--population-size" in shown and "12000000" in shown
    assert "ENV_ID" in run("rl", "--seed", 1, status=2)[1]
