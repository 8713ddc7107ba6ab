"""``eggroll`` as it is typed: what its commands print and leave behind, and how they end."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from forking import Forked
from launching import start, torchrun

from eggroll_trainer.cli.machine import advice, everything
from eggroll_trainer.cli.main import COMMANDS, main
from eggroll_trainer.plotting import load_run

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

# Tasks and settings are arbitrary.
pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")

# What the commands import as they go.
MODULES = ("eggroll_trainer.cli.main", "tyro", "matplotlib.figure", "matplotlib.backends.backend_agg")

FACTORY = """
import time, torch
from torch import nn
from eggroll_trainer import EGGROLLTrainer

x = torch.ones(4, 3)

def fitness(model):
    return -model(x).square().mean().item()

def make(width=2, bias=True):
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.Linear(width, 1)), fitness

def slow():
    def fitness(model):
        time.sleep(0.005)
        return -model(x).square().mean().item()
    return nn.Linear(3, 1), fitness

def trainer():
    return EGGROLLTrainer(model=nn.Linear(3, 1), fitness_fn=fitness, population_size=8, seed=1)

def wrong():
    return nn.Linear(3, 1)

def constant():
    return nn.Linear(3, 1), lambda model: float("nan")

def text():
    return nn.Linear(3, 1), lambda model: "good"

def mine():
    def fitness(model):
        raise ValueError("my own bug")
    return nn.Linear(3, 1), fitness

def broken():
    raise LookupError("my own bug")

number = 3
"""
SMALL = ("--population-size", 8, "--no-tensorboard")


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("factory")
    (folder / "mine_for_tests.py").write_text(FACTORY)
    return f"{folder}/mine_for_tests.py"


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[Forked]:
    with start("-m", "eggroll_trainer", *arguments, modules=MODULES) as process:
        yield process


class Run(Protocol):
    def __call__(self, *arguments: object, status: int = 0) -> tuple[str, str]: ...


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, and return what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(*arguments: object, status: int = 0) -> tuple[str, str]:
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as end:
            found = int(end.code or 0)
        printed = capsys.readouterr()
        assert found == status, printed
        return printed.out, printed.err

    return run


def test_usage(run: Run) -> None:
    shown, _ = run()
    assert shown.startswith("usage: eggroll COMMAND") and all(f"\n  eggroll {name}" in shown for name in COMMANDS)
    assert "examples:" in shown and run("--help")[0] == shown
    assert run("--version")[0].count(".") == 2
    errors = run("trian", status=2)[1]
    assert "unknown command 'trian': did you mean train?" in errors and "usage:" in errors


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_examples(command: str, run: Run) -> None:
    shown, errors = run(command, "--help")
    assert f"eggroll {command}" in shown and not errors
    if command != "info":
        assert "Examples:" in shown
    if COMMANDS[command].resumable:
        assert "--config FILE" in shown and "--resume" in shown


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [(("rl", "CartPole-v1", "--help"), "stdout"), (("info",), "both"), (("nonsense",), "stderr")],
)
def test_a_closed_pipe_is_no_error(arguments: tuple[str, ...], closed: str) -> None:
    with started(*arguments) as process:
        for name in ("stdout", "stderr"):
            if closed in (name, "both"):
                getattr(process, name).close()
        shown = process.stderr.read() if closed == "stdout" else ""
        assert process.wait(60) == (2 if arguments == ("nonsense",) else 0)
    assert "Traceback" not in shown and "Broken" not in shown and "Exception" not in shown


def test_a_run_whose_pipes_close_goes_on(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started("train", f"{factory}:make", "--generations", 30, *SMALL, "--out", out) as process:
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 0
    assert len(load_run(out)) == 30 and (out / "curve.png").exists()


def test_train_leaves_everything(factory: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--generations", 6, "--set", "width=5", "--set", "bias=false", "--population-size", 8)
    shown, errors = run("train", f"{factory}:make", *options, "--out", out)
    assert "mean fitness: -" in shown and "best member: -" in shown and f"curve: {out}/curve.png" in shown
    assert f"next: --resume --generations 12 continues; tensorboard --logdir {out}" in shown
    assert "6/6 [" in errors
    state = torch.load(out / "model.pt")
    assert {key: list(value.shape) for key, value in state.items()} == {
        "0.weight": [5, 3],
        "1.weight": [1, 5],
        "1.bias": [1],
    }
    assert load_run(out).x().tolist() == [1, 2, 3, 4, 5, 6]
    assert [*out.glob("events.out.tfevents*")] and [*(out / "checkpoints").glob("checkpoint-00000006.pt")]
    assert json.loads((out / "config.json").read_text())["set"] == ["width=5", "bias=false"]


def test_settings_from_a_file(factory: str, run: Run, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    whole = ("train", f"{factory}:make", "--generations", 3, *SMALL, "--seed", 5, "--set", "width=4")
    run(*whole, "--out", first)
    run("train", "--config", first, "--out", second)
    run("train", f"--config={first}/config.json", "--sigma", 0.2, "--out", third)
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    config = json.loads((third / "config.json").read_text())
    assert config["sigma"] == 0.2 and config["seed"] == 5 and config["set"] == ["width=4"]
    bad = tmp_path / "bad.json"
    for text, message in (
        ('{"sgima": 1}', "there is no setting 'sgima'; did you mean sigma?"),
        ("[1]", "must be an object with settings, got list"),
        ("sigma: 1", "is not JSON"),
    ):
        bad.write_text(text)
        errors = run("train", "--config", bad, status=2)[1]
        assert message in errors and "Traceback" not in errors
    assert "No such file" in run("rl", "--config", tmp_path / "none.json", status=2)[1]
    assert "needs the name of a file" in run("train", "--config", status=2)[1]


def test_ctrl_c_leaves_a_run_to_go_on_with(factory: str, run: Run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("train", f"{factory}:slow", *SMALL)
    with started(*options, "--generations", 10**6, "--out", parts) as process:
        while not (parts / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
    assert f"stopped; continue with: eggroll train {factory}:slow" in errors and errors.strip().endswith("--resume")
    assert "Traceback" not in errors
    last = len(load_run(parts)) + 3
    run(*options, "--generations", last, "--out", parts, "--resume")
    run(*options, "--generations", last, "--out", whole)
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()


def test_a_trainer_and_what_ends_training(factory: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown, _ = run("train", f"{factory}:trainer", "--generations", 10**6, "--time-limit", 1, "--out", out)
    assert "by TimeLimit(1)" in shown
    errors = run("train", f"{factory}:trainer", "--sigma", 0.2, "--out", tmp_path / "b", status=2)[1]
    assert "returns a trainer, which has its own settings: leave out --sigma" in errors
    shown, _ = run("train", f"{factory}:make", *SMALL, "--goal", -100, "--out", tmp_path / "c")
    assert "ended after generation 1 by EarlyStopping" in shown


def test_train_says_what_is_wrong(factory: str, run: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    for arguments, status, message in (
        ((f"{factory}:number",), 2, "'number' is a int"),
        ((f"{factory}:none",), 2, "'none' is no function"),
        (("nothing",), 2, "must be MODULE:FUNCTION or FILE.py:FUNCTION, got 'nothing'"),
        ((f"{factory}:make", "--set", "width"), 2, "--set must be NAME=VALUE, got 'width'"),
        ((f"{factory}:make", "--set", "depth=3"), 2, "make() cannot be called with the arguments of --set: got an"),
        ((f"{factory}:wrong",), 2, "must return a trainer, or a model and its fitness function; got Linear"),
        ((f"{factory}:make", "--population-size", 0), 2, "population_size must be at least 1"),
        ((f"{factory}:make", "--resume"), 1, "no run to resume"),
        ((f"{factory}:make", "--optimizer", "lion"), 2, "lion"),
        ((), 2, "MODULE:FACTORY"),
    ):
        errors = run("train", *arguments, *out, status=status)[1]
        assert message in errors and "Traceback" not in errors
    for name, message in (("constant", "finite"), ("text", "must return a float")):
        errors = run("train", f"{factory}:{name}", *SMALL, "--out", tmp_path / name, status=1)[1]
        assert message in errors and "Traceback" not in errors
    # What the user's function raises needs its traceback.
    with pytest.raises(ValueError, match="my own bug"):
        run("train", f"{factory}:mine", *SMALL, "--out", tmp_path / "mine")
    with pytest.raises(LookupError, match="my own bug"):
        run("train", f"{factory}:broken", *out)


def test_train_by_several_processes(factory: str, run: Run, tmp_path: Path) -> None:
    options = ("train", f"{factory}:make", "--generations", 4, *SMALL, "--chunk-size", 4)
    run(*options, "--out", tmp_path / "one")
    torchrun(2, "-m", "eggroll_trainer", *options, "--out", tmp_path / "two")
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == (tmp_path / "two" / "metrics.jsonl").read_text()


def test_tune(factory: str, run: Run, tmp_path: Path) -> None:
    files = ("--plot", tmp_path / "tuned.png", "--out", tmp_path / "a" / "tuned.json")
    shown, _ = run(
        "tune", f"{factory}:make", "--population-size", 16, "--sigma", 30, "--budget", 20, "--set", "width=3", *files
    )
    assert "linear share" in shown and shown.endswith(f"next: eggroll train --config {files[3]}\n")
    assert (tmp_path / "tuned.png").stat().st_size > 5000
    # What was found trains, with the rest of the settings.
    tuned = json.loads((tmp_path / "a" / "tuned.json").read_text())
    assert tuned["sigma"] < 30 and tuned["population_size"] == 16
    run("train", "--config", files[3], "--generations", 2, "--no-tensorboard", "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config[name] for name in tuned} == tuned
    # And a run's settings are tuned.
    shown, _ = run("tune", "--config", tmp_path / "run", "--budget", 20, *files[:2])
    assert "next: eggroll train" in shown and "--sigma " in shown
    # A trainer has its settings itself.
    shown, _ = run("tune", f"{factory}:trainer", "--budget", 20, *files[:2])
    assert "next: set sigma=" in shown and "eggroll train" not in shown
    for arguments, status, message in (
        ((f"{factory}:trainer", "--out", files[3]), 2, "leave out --out"),
        ((f"{factory}:make", "--budget", 3), 1, "budget must be at least 20"),
        ((f"{factory}:constant", "--budget", 20, "--population-size", 8), 1, "same fitness"),
        ((f"{factory}:wrong",), 2, "must return a trainer"),
    ):
        errors = run("tune", *arguments, *files[:2], status=status)[1]
        assert message in errors and "Traceback" not in errors


def test_plot(factory: str, run: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        run("train", f"{factory}:make", "--generations", 3, *SMALL, "--seed", seed, "--out", tmp_path / f"run-{seed}")
    runs = (tmp_path / "run-0", tmp_path / "run-1")
    shown, _ = run("plot", *runs, "--names", "zero", "one", "--style", "dark", "--out", tmp_path / "a" / "plot.svg")
    assert shown == f"plot: {tmp_path}/a/plot.svg\n"
    text = (tmp_path / "a" / "plot.svg").read_text()
    assert ">zero<" in text and ">one<" in text
    for arguments, status, message in (
        ((tmp_path / "nothing",), 1, "there is no run at"),
        ((tmp_path,), 1, "contains no run"),
        ((runs[0], "--x", "steps"), 1, "run-0 has no column 'steps'; it has "),
        ((runs[0], "--metrics", "loss"), 1, "no run has 'loss'"),
        ((runs[0], "--out", tmp_path / "plot.gif5"), 1, "must end in .png, .svg or .pdf"),
        ((*runs, "--names", "one"), 2, "1 names for 2 runs"),
        ((), 2, "at least one run"),
    ):
        errors = run("plot", *arguments, status=status)[1]
        assert message in errors and "Traceback" not in errors


def test_bench(run: Run) -> None:
    options = ("--population-size", 16, "--seconds", 0.05, "--no-compile")
    found = json.loads(run("bench", *options, "--json")[0])
    assert found["inference"] > 0 and found["eager"] > 0 and found["population_size"] == 16
    shown, _ = run("bench", *options, "--rank", 2)
    assert "pure inference of the same rows" in shown and "× inference" in shown and "rank 2" in shown
    assert "--seconds must be above 0" in run("bench", "--seconds", 0, status=1)[1]
    assert "eggroll bench: " in run("bench", "--device", "nowhere", status=1)[1]


def test_info(run: Run) -> None:
    shown, _ = run("info")
    assert f"torch {torch.__version__}" in shown and "\nspeed " in shown and "\nprocessor " in shown
    found = json.loads(run("info", "--json")[0])
    assert found["versions"]["torch"] == torch.__version__ and found["processor"]["cores"] >= 1
    assert found["extras"]["rl"]["tyro"] and "dev" not in found["extras"]


def test_advice_follows_from_the_machine() -> None:
    machine = everything()
    machine |= {"compiler": None, "devices": [], "bfloat16_over_float32": 6.0}
    machine["versions"]["torch"] = "2.13.0"
    machine["processor"] |= {"cores": 8, "threads": 2}
    told = " ".join(advice(machine))
    assert "there is no C++ compiler" in told and "6.0 times as long" in told
    assert "torch uses 2 of 8 cores: OMP_NUM_THREADS=8" in told and "--nproc-per-node 4" in told
    machine |= {"devices": [{"device": "cuda:0", "name": "a GPU"}], "bfloat16_over_float32": 0.4}
    machine["versions"]["torch"] = "2.6.0+cpu"
    told = " ".join(advice(machine))
    assert "2.8 or later" in told and "0.40 of the time" in told and "device='cuda:0'" in told


def test_demo(run: Run, tmp_path: Path) -> None:
    options = ("--generations", 3, "--population-size", 8, "--hidden", 8)
    shown, _ = run("demo", *options, "--out", tmp_path / "demo.png")
    assert "of the points before" in shown and (tmp_path / "demo.png").stat().st_size > 10_000
    assert "population_size" in run("demo", "--population-size", -2, status=1)[1]


@pytest.mark.slow
def test_the_demo_learns(run: Run, tmp_path: Path) -> None:
    shown, _ = run("demo", "--out", tmp_path / "demo.png")
    right = int(shown.split("before, ")[1].split("%")[0])
    assert right >= 97


def test_a_package_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # An import of it fails.
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "eggroll_trainer.cli.plot", raising=False)
    assert "pip install 'eggroll_trainer[cli]'" in run("plot", "x", status=1)[1]
    assert "versions" in run("info")[0]
