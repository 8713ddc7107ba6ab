"""The folder of a run that a command started."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from eggroll_trainer.callbacks.run_folder import METRICS, RunFolder

pytest.importorskip("tensorboard")


@dataclasses.dataclass
class Settings:
    sigma: float = 0.1
    steps: int = 10
    sizes: tuple[int, ...] = (1, 2)
    out: Path | None = None
    resume: bool = False


def folder(path: Path, *, extra: Any = None, **settings: Any) -> RunFolder:
    return RunFolder(path, Settings(out=path, **settings), {"steps"}, (METRICS, "more.jsonl"), extra)


def test_a_run_is_resumed_with_the_same_settings(tmp_path: Path) -> None:
    folder(tmp_path / "run").open()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sizes"] == [1, 2]
    folder(tmp_path / "run", resume=True, steps=20).open()
    with pytest.raises(ValueError, match=r"sigma=0\.2 \(was 0\.1\)"):
        folder(tmp_path / "run", resume=True, sigma=0.2).open()
    with pytest.raises(ValueError, match=r"data=1 \(was None\)"):
        folder(tmp_path / "run", resume=True, extra={"data": 1}).open()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    folder(tmp_path).open()
    # Nothing was recorded yet.
    folder(tmp_path, sigma=0.2).open()
    for name in (METRICS, "more.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match="--resume"):
            folder(tmp_path).open()
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        folder(tmp_path / "other", resume=True).open()


def test_records_are_cut_and_go_on(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with run.writing(main=True) as writer:
        for i in range(1, 4):
            writer.metrics({"generation": i, "text": "a\u2028b"}, i)
        writer.append("more.jsonl", {"a": 1}, {"a": 2})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"generation": 4, "te')
    assert [line["generation"] for line in run.cut(METRICS, lambda i, line: i < 3)] == [1, 2, 3]
    assert [line["generation"] for line in run.cut(METRICS, lambda i, line: i < 2)] == [1, 2]
    assert run.cut("more.jsonl", lambda i, line: line["a"] > 1) == [{"a": 2}]
    assert run.cut("none.jsonl", lambda i, line: True) == []
    with run.writing(main=True, step=2) as writer:
        writer.metrics({"generation": 3}, 3)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["generation"] for line in lines] == [1, 2, 3] and lines[0]["text"] == "a\u2028b"


def test_tensorboard_shows_what_was_not_cut(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder(tmp_path)
    with run.writing(main=True) as writer:
        for step in (1, 2, 3):
            writer.scalars({"generation": step, "reward": float(step), "name": "x"}, step, "eval/")
    with run.writing(main=True, step=2) as writer:
        writer.scalars({"reward": 30.0}, 3, "eval/")
        writer.text("completions", "    yes", 3)
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert shown.Tags()["scalars"] == ["eval/reward"]
    assert [(e.step, e.value) for e in shown.Scalars("eval/reward")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert b"yes" in shown.Tensors("completions/text_summary")[0].tensor_proto.string_val[0]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with folder(tmp_path).writing(main=False) as writer:
        writer.metrics({"generation": 1}, 1)
        writer.append("more.jsonl", {"a": 1})
        writer.text("completions", "yes", 1)
    assert list(tmp_path.iterdir()) == []
