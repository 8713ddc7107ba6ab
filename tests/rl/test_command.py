"""``eggroll rl`` as it is typed: a run's folder, a run that is killed and resumed, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import start

pytest.importorskip("gymnasium")

SMALL = ("--population-size", "8", "--eval-every", "2", "--eval-episodes", "2", "--save-every", "2", "--no-compile")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "eggroll_trainer", *map(str, arguments)]


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second")} for line in lines]


def test_a_run_leaves_everything(tmp_path: Path) -> None:
    done = run("rl", "Pendulum-v1", "--steps", 3200, *SMALL, "--out", tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "policy.pt", "curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "centre policy:" in done.stdout and ("video:" in done.stdout or "no video:" in done.stderr)
    lines = curve(tmp_path / "a")
    assert [line["steps"] for line in lines] == [1600, 3200] and "eval_return" in lines[-1]


def test_killed_and_resumed_is_the_same_curve(tmp_path: Path) -> None:
    arguments = ("rl", "Hopper-v5", "--steps", 6000, *SMALL, "--no-video")
    run(*arguments, "--out", tmp_path / "whole")
    killed = subprocess.Popen(command(*arguments, "--out", tmp_path / "killed"), stderr=subprocess.DEVNULL)
    while not [*(tmp_path / "killed" / "checkpoints").glob("checkpoint-*")]:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    run(*arguments, "--out", tmp_path / "killed", "--resume")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_that_draws_actions_writes_the_same_metrics(env_id: str, tmp_path: Path) -> None:
    arguments = ("rl", env_id, "--sample", "--no-video", *SMALL, "--eval-every", 1, "--population-size", 4)
    run(*arguments, "--steps", 4000, "--out", tmp_path / "whole")
    run(*arguments, "--steps", 1000, "--out", tmp_path / "parts")
    run(*arguments, "--steps", 4000, "--out", tmp_path / "parts", "--resume")
    whole = curve(tmp_path / "whole")
    assert len(whole) > 2 and all("eval_return" in line for line in whole)
    assert curve(tmp_path / "parts") == whole


def stopped(number: int, folder: Path, arguments: tuple[object, ...], status: int) -> str:
    """Start a long run, send it a signal after its first checkpoint, and return what it said to stderr."""
    with start("-m", "eggroll_trainer", *arguments, "--steps", 10**9) as process:
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
    run(*arguments, "--steps", steps + 1600, "--resume")
    assert curve(tmp_path / "a")[-1]["steps"] == steps + 1600


def test_processes_share_a_run(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", "--steps", 3200, *SMALL, "--no-video", "--chunk-size", 2)
    run(*arguments, "--out", tmp_path / "one")
    shared = command(*arguments, "--out", tmp_path / "two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([shared[0], *launcher, *shared[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 1
    assert curve(tmp_path / "two") == curve(tmp_path / "one")


def test_sigterm_leaves_a_run_to_resume(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", *SMALL, "--no-video", "--out", tmp_path / "a")
    errors = stopped(signal.SIGTERM, tmp_path / "a", arguments, 143)
    assert "Traceback" not in errors
    steps = curve(tmp_path / "a")[-1]["steps"]
    run(*arguments, "--steps", steps + 1600, "--resume")
    assert curve(tmp_path / "a")[-1]["steps"] == steps + 1600


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
    done = run("rl", *arguments, "--out", tmp_path / "a", check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    arguments = ("rl", "Pendulum-v1", "--steps", 1600, *SMALL, "--no-video", "--out", tmp_path / "a")
    run(*arguments)
    assert "holds a run already" in run(*arguments, check=False).stderr
    changed = run(*arguments, "--resume", "--sigma", 0.7, check=False)
    assert changed.returncode == 1 and "sigma=0.7 (was 0.05)" in changed.stderr


def test_help_lists_the_options() -> None:
    # With the task's own defaults, wherever its name stands.
    for arguments in (("HalfCheetah-v5", "--help"), ("--seed", 1, "HalfCheetah-v5", "--help")):
        shown = run("rl", *arguments).stdout
        assert "--population-size" in shown and "12000000" in shown
    assert "ENV_ID" in run("rl", "--seed", 1, check=False).stderr
    assert run().stdout.startswith("usage: eggroll rl") and run("train", check=False).returncode == 2
