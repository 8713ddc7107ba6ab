"""How ``train`` calls functions and objects, and what they can ask of it."""

from __future__ import annotations

import datetime
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import run_script, start
from torch import nn
from watching import Spy, make_trainer, raising

from eggroll_trainer.callbacks import (
    CSV,
    Callback,
    Checkpoints,
    EarlyStopping,
    JSONLines,
    Progress,
    ScoreLog,
    TensorBoard,
    TimeLimit,
)
from eggroll_trainer.callbacks.progress import postfix

pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")

# Tasks and settings are arbitrary.
pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")


def test_order_of_calls() -> None:
    calls: list[Any] = []
    trainer = make_trainer()
    trainer.train(
        3,
        verbose=False,
        log_every=2,
        callback=[Spy(calls, "a"), lambda *given: calls.append(("f", given[0], len(given[1]))), Spy(calls, "b")],
    )
    assert calls == [
        *[("a", "start", 0), ("b", "start", 0), ("a", 1), ("b", 1)],
        *[("a", 2), ("f", 2, 2), ("b", 2), ("a", 3), ("f", 3, 3), ("b", 3)],
        *[("b", "end", 3), ("a", "end", 3)],
    ]
    calls.clear()
    trainer.train(0, verbose=False, callback=Spy(calls))
    assert calls == [("", "start", 3), ("", "end", 3)]


def test_five_lines_are_enough() -> None:
    class Best:
        def on_generation(self, trainer: Any, metrics: Any) -> None:
            self.best = metrics["best_fitness"]

    best, trainer = Best(), make_trainer()
    assert trainer.train(2, verbose=False, callback=best)["best_fitness"] == best.best  # type: ignore[arg-type]


def test_what_one_adds_to_the_metrics_others_see() -> None:
    seen: list[float] = []
    add = Spy([], always=lambda trainer, metrics: metrics.update(test=0.5))
    look = Spy([], always=lambda trainer, metrics: seen.append(metrics["test"]))
    trainer = make_trainer()
    trainer.train(2, verbose=False, callback=[add, look])
    assert seen == [0.5, 0.5] and "test" not in trainer.history


STOPS: dict[str, Callable[..., Any]] = {
    "True": lambda *_: True,
    "numpy's": lambda *_: np.bool_(True),
    "torch's": lambda *_: torch.tensor(True),
    "StopIteration": raising(StopIteration("enough")),
}


@pytest.mark.parametrize("stop", list(STOPS))
def test_true_or_stop_iteration_ends_training(stop: str) -> None:
    calls: list[Any] = []
    trainer = make_trainer()
    result = trainer.train(
        9,
        verbose=False,
        log_every=5,
        # The function is called after the last generation, also if that was not to be the last.
        callback=[lambda generation, _: calls.append(generation), Spy(calls, at_2=STOPS[stop]), Spy(calls, "b")],
    )
    assert result["generation"] == 2 and result["stopped_by"] == "Spy"
    assert calls[-4:] == [("b", 2), 2, ("b", "end", 2), ("", "end", 2)]
    ended = trainer.train(5, verbose=False, callback=lambda *_: STOPS[stop]())
    assert ended["generation"] == 3 and "lambda" in ended["stopped_by"]
    assert trainer.train(2, verbose=False)["stopped_by"] is None and trainer.generation == 5


@pytest.mark.parametrize("value", [1, "yes", [1], np.ones(1, bool), None, False, 1.0])
def test_no_other_value_ends_training(value: Any) -> None:
    assert make_trainer().train(3, verbose=False, callback=lambda *_: value)["generation"] == 3


def test_on_start_can_end_training() -> None:
    calls: list[Any] = []
    result = make_trainer().train(3, verbose=False, callback=Spy(calls, at_start=raising(StopIteration())))
    assert calls == [("", "start", 0), ("", "end", 0)] and result["generation"] == 0


@pytest.mark.parametrize("when", ["start", "2", "end"])
def test_an_exception_ends_all_that_began(when: str) -> None:
    calls: list[Any] = []
    faulty = Spy(calls, "b", **{f"at_{when}": raising(LookupError(when))})
    trainer = make_trainer()
    with pytest.raises(LookupError, match=when):
        trainer.train(3, verbose=False, callback=[Spy(calls, "a"), faulty, Spy(calls, "c")])
    generation = {"start": 0, "2": 2, "end": 3}[when]
    begun = [call[0] for call in calls if call[1] == "start"]
    assert [call[0] for call in calls if call[1] == "end"] == begun[::-1]
    assert begun == (["a", "b"] if when == "start" else ["a", "b", "c"])
    # All saw the generation.
    assert [call[0] for call in calls if call[1] == generation] == ([] if when == "start" else ["a", "b", "c"])
    assert trainer.train(1, verbose=False)["generation"] == generation + 1


class Misspelt(Callback):
    def on_generation_end(self, trainer: Any, metrics: Any) -> None: ...


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "got int 3"),
        (["print"], "got str 'print'"),
        ({"a": print}, "got str 'a'"),
        (EarlyStopping, r"got the class EarlyStopping: EarlyStopping\(…\)"),
        ([print, EarlyStopping], "got the class EarlyStopping"),
        (Misspelt(), "did you mean on_generation"),
    ],
)
def test_bad_callbacks(given: Any, message: str) -> None:
    trainer = make_trainer()
    with pytest.raises(TypeError, match=message):
        trainer.train(1, verbose=False, callback=given)
    assert trainer.generation == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopping(None), ValueError, "a patience or a goal"),
        (lambda: EarlyStopping(0), ValueError, "patience must be at least 1"),
        (lambda: EarlyStopping(goal=math.nan), ValueError, "goal must be a finite number"),
        (lambda: EarlyStopping(mode="up"), ValueError, "'max' or 'min'"),
        (lambda: EarlyStopping(min_delta=-1), ValueError, "min_delta"),
        (lambda: TimeLimit(0), ValueError, "seconds must be a finite number above 0"),
        (lambda: TimeLimit("1h"), TypeError, "seconds must be a number"),  # type: ignore[arg-type]
        (lambda: TensorBoard("x", histogram_every=-1), ValueError, "histogram_every"),
        (lambda: TensorBoard("x").text("a", "b"), RuntimeError, "while a run goes on"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no metric 'accuracy' to stop by; there are agreement, best_fitness"):
        make_trainer().train(2, verbose=False, callback=EarlyStopping(metric="accuracy"))


def test_the_result_is_short_to_look_at() -> None:
    result = make_trainer().train(60, verbose=False)
    assert isinstance(result, dict) and len(result["fitness_history"]) == 60
    for text in (repr(result), str(result)):
        assert len(text) < 700 and "(60 values)" in text and "'generation': 60" in text
    assert pickle.loads(pickle.dumps(result)) == result == dict(result) and json.dumps(result)
    assert "values)" not in repr(make_trainer().train(3, verbose=False))


def test_early_stopping_is_the_same_after_a_resume(tmp_path: Path) -> None:
    stop: dict[str, Any] = {"patience": 7, "min_delta": 0.01}
    whole = make_trainer(learning_rate=0.1)
    assert 10 < whole.train(2000, verbose=False, callback=EarlyStopping(**stop))["generation"] < 2000
    first, again = make_trainer(learning_rate=0.1), make_trainer(learning_rate=0.1)
    first.train(whole.generation - 3, verbose=False, callback=EarlyStopping(**stop))
    first.save(tmp_path / "run.pt")
    again.load(tmp_path / "run.pt")
    again.train(2000, verbose=False, callback=EarlyStopping(**stop))
    assert again.generation == whole.generation
    # It has ended.
    assert again.train(5, verbose=False, callback=EarlyStopping(**stop))["generation"] == whole.generation


def test_a_goal_and_a_metric_to_lower() -> None:
    reached = make_trainer(learning_rate=0.1)
    reached.train(2000, verbose=False, callback=EarlyStopping(None, goal=-0.5))
    means = reached.history["mean_fitness"]
    assert means[-1] >= -0.5 > max(means[:-1])
    lowered = EarlyStopping(None, metric="loss", mode="min", goal=0.5)
    add = Spy([], always=lambda trainer, metrics: metrics.update(loss=-metrics["mean_fitness"]))
    result = make_trainer(learning_rate=0.1).train(2000, verbose=False, callback=[add, lowered])
    assert result["generation"] == reached.generation and "goal=0.5" in result["stopped_by"]


@pytest.mark.parametrize(
    "stop", [{"patience": 7, "min_delta": 0.01}, {"patience": None, "goal": 0.5, "metric": "best_fitness"}]
)
def test_early_stopping_follows_the_direction_of_the_fitness(stop: dict[str, Any]) -> None:
    def loss(module: nn.Module) -> float:
        return abs(module(torch.ones(1, 3)).item())

    rises, falls = make_trainer(learning_rate=0.1), make_trainer(loss, learning_rate=0.1, maximize=False)
    falls.train(2000, verbose=False, callback=EarlyStopping(**stop))
    if "goal" in stop:
        stop = {**stop, "goal": -stop["goal"]}
    rises.train(2000, verbose=False, callback=EarlyStopping(**stop))
    assert 10 < falls.generation == rises.generation < 2000


def test_a_mode_that_is_given_holds_for_losses_too() -> None:
    above = EarlyStopping(None, goal=0.0, mode="max")
    trainer = make_trainer(lambda module: abs(module(torch.ones(1, 3)).item()), maximize=False)
    assert trainer.train(9, verbose=False, callback=above)["generation"] == 1


def test_a_time_limit() -> None:
    def slow(module: nn.Module) -> float:
        time.sleep(0.01)
        return 0.0

    trainer = make_trainer(slow)
    began = time.monotonic()
    trainer.train(10**6, verbose=False, callback=TimeLimit(datetime.timedelta(seconds=1)))
    # A generation takes 0.08 s at least, and the last one has to fit.
    assert time.monotonic() - began < 1.5 and 1 <= trainer.generation <= 12


def test_checkpoints_may_be_among_the_callbacks(tmp_path: Path) -> None:
    def halve(trainer: Any, metrics: Any) -> None:
        trainer.sigma *= 0.5

    first = make_trainer()
    first.train(4, verbose=False, callback=[Checkpoints(tmp_path, every=2), Spy([], at_2=halve)])
    # What a callback changed after the second generation is in its checkpoint.
    again = make_trainer()
    again.load(tmp_path / "checkpoint-00000002.pt")
    assert again.sigma == 0.05
    again.train(2, verbose=False)
    assert torch.equal(again.current_params, first.current_params)


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_the_score_log_has_the_generation_after_which_a_callback_raised(
    error: type[BaseException], tmp_path: Path
) -> None:
    trainer = make_trainer()
    with pytest.raises(error):
        trainer.train(4, verbose=False, callback=Spy([], at_3=raising(error())), checkpoints=Checkpoints(tmp_path))
    again = make_trainer()
    assert ScoreLog(tmp_path / "scores.jsonl").replay(again) == trainer.generation == 3
    assert torch.equal(again.current_params, trainer.current_params)
    assert (tmp_path / "checkpoint-00000003.pt").exists()


def test_ctrl_c_at_the_end_of_a_generation_loses_no_record(tmp_path: Path) -> None:
    trainer = make_trainer()

    def strike(optimizer: Any, arguments: Any, options: Any) -> None:
        if trainer.generation == 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._centre.optimizer.register_step_pre_hook(strike)
    lines = JSONLines(tmp_path / "run.jsonl")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(4, verbose=False, callback=lines, checkpoints=Checkpoints(tmp_path))
    assert [line["generation"] for line in lines.read()] == [1, 2] and trainer.generation == 2
    assert lines.read()[-1].keys() == lines.read()[0].keys()
    assert ScoreLog(tmp_path / "scores.jsonl").replay(make_trainer()) == 2


@pytest.mark.parametrize("kind", [JSONLines, CSV])
def test_a_file_of_another_run_is_not_overwritten(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run"
    make_trainer().train(3, verbose=False, callback=kind(path))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make_trainer().train(1, verbose=False, callback=kind(path))
    assert len(kind(path).read()) == 3
    make_trainer().train(1, verbose=False, callback=kind(path, overwrite=True))
    assert [one["generation"] for one in kind(path).read()] == [1]
    assert [p.name for p in path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", [JSONLines, CSV])
def test_a_record_that_was_not_written_to_its_end(kind: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train(3, verbose=False, callback=kind(tmp_path / "run"))
    whole = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(whole[:-5])
    assert len(kind(tmp_path / "run").read()) == 2
    trainer.train(1, verbose=False, callback=kind(tmp_path / "run"))
    assert [one["generation"] for one in kind(tmp_path / "run").read()] == [1, 2, 4]


def test_a_column_that_comes_later_and_texts(tmp_path: Path) -> None:
    text = 'He said "two, or\nthree"\u2028lines'
    late = Spy([], at_2=lambda trainer, metrics: metrics.update(accuracy=math.nan, loss=0.1, advice=text))
    trainer = make_trainer()
    table, lines = CSV(tmp_path / "run.csv"), JSONLines(tmp_path / "run.jsonl")
    trainer.train(3, verbose=False, callback=[late, table, lines])
    rows = table.read()
    assert [row.get("loss") for row in rows] == [None, 0.1, None] and rows[1]["advice"] == text
    assert lines.read()[1]["advice"] == text and lines.read()[1]["accuracy"] is None
    assert [row["mean_fitness"] for row in rows] == trainer.fitness_history
    # Any reader of JSON takes it.
    assert "NaN" not in lines.path.read_text()


def test_a_file_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    gone = Spy([], at_2=lambda *_: shutil.rmtree(tmp_path / "run"))
    trainer = make_trainer()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl'\) could not write, but training goes on: .*No such file"):
        trainer.train(2, verbose=False, callback=[gone, JSONLines(tmp_path / "run" / "metrics.jsonl")])
    assert trainer.generation == 2


def test_progress_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    light = Spy([], always=lambda trainer, metrics: metrics.update(status="red"))
    trainer.train(50, verbose=False, callback=[light, Progress(50)])
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("1/50 [00:00<") and "gen/s" in first and "🔴 red" in first
    assert last.startswith("50/50 [") and f"best={trainer.best_fitness:.4g}" in last
    trainer.train(2, verbose=False, callback=Progress())
    assert "2 [" in capsys.readouterr().err


def test_progress_of_other_words() -> None:
    assert postfix({"mean_fitness": 1.0, "best_fitness": 2.0, "status": "ok"}) == "mean=1, best=2, ok"
    assert postfix({"mean_fitness": 1.0, "best_fitness": 2.0, "status": None}) == "mean=1, best=2"


SCRIPT = """
import sys
sys.path[:0] = {paths}
from watching import make_trainer
from eggroll_trainer.callbacks import Checkpoints, JSONLines
trainer, checkpoints = make_trainer(), Checkpoints({folder!r} + "/kept", every=5)
checkpoints.restore(trainer)
trainer.train(int(sys.argv[1]) - trainer.generation, callback=[checkpoints, JSONLines({folder!r} + "/run.jsonl")])
"""


def test_interrupted_and_killed_processes_leave_every_generation_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=sys.path, folder=str(tmp_path)))
    lines, lengths = JSONLines(tmp_path / "run.jsonl"), [0]
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        with start(script, 10**6) as process:
            while len(lines.read()) < lengths[-1] + 20:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            process.communicate(timeout=60)
        lengths.append(len(lines.read()))
    last = lengths[-1] + 10
    with start(script, last) as process:
        errors = process.communicate(timeout=60)[1]
    assert [line["generation"] for line in lines.read()] == list(range(1, last + 1))
    # It is no terminal.
    assert "\r" not in errors and "10/" in errors


def test_of_several_processes_the_first_one_calls(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
from watching import Spy
from eggroll_trainer.callbacks import JSONLines
def change(trainer, metrics):
    trainer.sigma *= 0.5
def stop(trainer, metrics):
    trainer.learning_rate = 0.5
    return True
calls = []
trainer = make(EGGROLLTrainer, None)
result = trainer.train(
    9, verbose=False, callback=[Spy(calls, at_start=change, at_3=stop, at_end=change), JSONLines(out + "/run.jsonl")]
)
say(len(calls), trainer.generation, trainer.sigma, trainer.learning_rate, result["stopped_by"], trainer.checksum())
""".replace("out +", repr(str(tmp_path)) + " +"),
    )
    first, second = said[0][0].split(), said[1][0].split()
    assert first[0] == "5" and second[0] == "0"
    assert first[1] == "3" and first[3:5] == ["0.5", "Spy"] and first[1:] == second[1:]
    assert [line["generation"] for line in JSONLines(tmp_path / "run.jsonl").read()] == [1, 2, 3]


def test_only_the_first_process_needs_callbacks(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
def change(generation, history):
    say("called", generation)
    trainer.sigma *= 0.5
    return generation == 4
trainer = make(EGGROLLTrainer, None)
trainer.train(9, verbose=False, log_every=2, callback=change if trainer.is_main else None)
trainer.train(2, verbose=False, callback=None if trainer.is_main else change)
say(trainer.generation, trainer.sigma, trainer.checksum())
""",
    )
    assert said[0][:2] == ["called 2", "called 4"] and len(said[1]) == 1
    assert said[0][2] == said[1][0] and said[0][2].startswith("6 ")
