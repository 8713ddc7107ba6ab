"""Data sets and functions that a command line names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eggroll_trainer._utils.importing import function_named
from eggroll_trainer.llm.data import as_conversations, check_columns, held_out, load_examples

MODULE = "eggroll_functions_of_a_test"
ROWS = [{"prompt": "one\u2028", "answer": "1"}, {"prompt": "two", "answer": "2"}]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def written(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def module(body: str) -> None:
    written(f"{MODULE}.py", body)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", "\ufeffprompt,answer\none\u2028,1\ntwo,2\n"),
    ],
)
def test_files(name: str, text: str) -> None:
    assert load_examples("--data", written(name, text), "prompt") == ROWS


def test_functions() -> None:
    module("def rows():\n    return [{'prompt': 'a'}]\ndef texts():\n    yield from ('a', 'b')\nnumber = 3\n")
    assert load_examples("--data", f"{MODULE}:rows", "prompt") == [{"prompt": "a"}]
    assert load_examples("--data", f"{MODULE}.py:texts", "text") == [{"text": "a"}, {"text": "b"}]
    assert function_named("--reward", f"{MODULE}:rows") is function_named("--reward", f"{MODULE}.py:rows")


def test_a_file_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / f"{MODULE}.py").write_text("def f():\n    return 5\n")
    assert function_named("--reward", f"inner/{MODULE}.py:f")() == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("share", "must be MODULE:FUNCTION or FILE.py:FUNCTION, got 'share'"),
        (f"{MODULE}:", "must be MODULE:FUNCTION"),
        ("no_such_module:share", "no module 'no_such_module'"),
        ("no_such_file.py:share", "no file no_such_file.py"),
        ("math.py:share", "another module named 'math'"),
        (f"{MODULE}:nothing", f"'nothing' is no function in {MODULE}"),
        (f"{MODULE}:number", "'number' is a int"),
    ],
)
def test_functions_that_are_not_there(name: str, message: str) -> None:
    module("number = 3\n")
    written("math.py", "")
    with pytest.raises(ValueError, match="--reward.*") as raised:
        function_named("--reward", name)
    assert message in str(raised.value)


def test_what_a_module_itself_lacks_is_said_as_it_is() -> None:
    module("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        function_named("--reward", f"{MODULE}:share")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 of a.jsonl is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n3\n', "row 1 of a.jsonl must be an object with columns, got int"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "x": 1}\n', "column 'x' is in row 1 of a.jsonl and not in row 0"),
        ("a.jsonl", '{"prompt": "a", "x": 1}\n{"prompt": "b"}\n', "column 'x' is in row 0 of a.jsonl and not in row 1"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", '{"data": []}', "must hold a list of objects, got a dict"),
        ("a.csv", "prompt,answer\na\n", "line 2 of a.csv has another number of values"),
        ("a.csv", "prompt,answer\na,1,2\n", "line 2 of a.csv has another number of values"),
        ("a.txt", "", "must be a .jsonl, .json, .csv file or MODULE:FUNCTION, got 'a.txt'"),
    ],
)
def test_files_that_are_wrong(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--data") as raised:
        load_examples("--data", written(name, text), "prompt")
    assert message in str(raised.value)


def test_other_bad_data() -> None:
    with pytest.raises(FileNotFoundError, match=r"--data: there is no file none\.csv"):
        load_examples("--data", "none.csv", "prompt")
    module("def splits():\n    return {'train': []}\n")
    with pytest.raises(ValueError, match="got a dict; return one of its splits"):
        load_examples("--data", f"{MODULE}:splits", "prompt")
    module("def rows():\n    yield 1 / 0\n")
    del sys.modules[MODULE]
    with pytest.raises(RuntimeError, match="rows raised ZeroDivisionError"):
        load_examples("--data", f"{MODULE}:rows", "prompt")
    with pytest.raises(ValueError, match=r"no column 'question'; its columns are 'prompt', 'answer'.*--prompt-key"):
        check_columns("--data", "a.csv", ROWS, {"--prompt-key": "question"})


def test_prompts_held_out_are_not_trained_on() -> None:
    rows: list[dict[str, Any]] = [{"prompt": str(i % 20), "row": i} for i in range(60)]
    train, held = held_out(rows, "prompt", 0.25, seed=3)
    assert len({row["prompt"] for row in held}) == 5 and len(held) == 15
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held)
    assert sorted(row["row"] for row in [*train, *held]) == list(range(60))
    assert held_out(rows, "prompt", 0.25, seed=3) == (train, held)
    assert held_out(rows, "prompt", 0.25, seed=4)[1] != held
    assert held_out(rows, "prompt", 0.0, seed=3) == (rows, rows)
    # On either side there is something.
    assert [len(part) for part in held_out(ROWS, "prompt", 0.99, 0)] == [1, 1]
    assert [len(part) for part in held_out(ROWS, "prompt", 0.01, 0)] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "fraction", "message"), [(ROWS, 1.0, "below 1, got 1.0"), (ROWS[:1], 0.1, "only one prompt")]
)
def test_what_cannot_be_held_out(rows: list[dict[str, Any]], fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out(rows, "prompt", fraction, 0)


def test_texts_become_conversations() -> None:
    messages = [{"role": "user", "content": "b"}]
    rows = as_conversations([{"prompt": "a", "answer": 1}, {"prompt": messages, "answer": 2}], "prompt", "Be brief.")
    assert rows[0]["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert rows[0]["answer"] == 1 and rows[1]["prompt"] is messages
    assert as_conversations([{"prompt": "a"}], "prompt", None) == [{"prompt": [{"role": "user", "content": "a"}]}]
