"""The example of a language model that learns which number is larger, for a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft_adapters import quiet

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_it_runs(method: Any, tmp_path: Path) -> None:
    import larger_number
    import train_on_server

    with quiet():
        train_on_server.make_tiny_model(tmp_path / "model")
        out = tmp_path / "curve.jsonl"
        larger_number.main(larger_number.Options(str(tmp_path / "model"), method, out=out, smoke=True))
    options, *lines = map(json.loads, out.read_text().splitlines())
    assert options["method"] == method
    assert [line["generation"] for line in lines] == [0, 1, 2]


def test_held_out_pairs_are_not_trained_on() -> None:
    import larger_number

    held_out = larger_number.pairs(200, seed=12345)
    train = larger_number.pairs(1000, 0, avoided=frozenset(held_out))
    assert len(set(train)) == 1000
    assert {frozenset(pair) for pair in train}.isdisjoint(frozenset(pair) for pair in held_out)
