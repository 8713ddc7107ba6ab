"""The history in a checkpoint: the same numbers in a small file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, make

from eggroll_trainer.checkpoints.history import pack, unpack

COLUMNS: dict[str, list[Any]] = {
    "empty": [],
    "floats": [random.Random(0).gauss(0, 1) for _ in range(100)],
    "single precision": [0.5, -1.25, 3.0, float("inf")],
    "zeros": [0.0, -0.0, 5e-324, 1e308],
    "counter": list(range(1, 500)),
    "whole": [2**63 - 1, -(2**63), 0, 7],
    "too large": [2**70, 1],
    "gaps": [None, 0.1, None, None, 3.0, None],
    "gaps in whole numbers": [1, None, 3],
    "nothing": [None, None],
    "flags": [True, False],
    "mixed": [1, 2.0],
    "texts": ["a", "b", None],
    "lists": [[1.0, 2.0], [3.0]],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_unpacked_is_what_was_packed(name: str) -> None:
    history = {name: COLUMNS[name]}
    # Of the same types, zeros with their signs.
    assert repr(unpack(pack(history))) == repr(history)


def test_not_a_number() -> None:
    (value,) = unpack(pack({"a": [float("nan")]}))["a"]
    assert value != value


def test_lists_of_older_files() -> None:
    assert unpack({"a": [1, 2.0, None]}) == {"a": [1, 2.0, None]}


def test_a_long_history_in_a_file(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "a.pt"
    trainer.train(2, verbose=False)
    random_numbers, count = random.Random(0), 20_000
    for key, values in trainer.history.items():
        constant = key in ("learning_rate", "sigma", "num_nonfinite", "num_tied")
        trainer.history[key] = [values[0] if constant else random_numbers.gauss(0, 1) for _ in range(count)]
    trainer.history["generation"] = list(range(1, count + 1))
    trainer.save(path)
    # Ten columns of random doubles, of which the exponents can be compressed; 107 bytes a generation as a list.
    assert path.stat().st_size < 77 * count
    twin = make()
    twin.load(path)
    assert_same(twin.history, trainer.history)
    # What is loaded can be added to.
    assert twin.step()["generation"] == 3 and len(twin.history["fitness"]) == count + 1


def test_a_damaged_column(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "a.pt"
    trainer.step()
    trainer.save(path)
    state = torch.load(path, weights_only=True)
    state["history"]["fitness"]["data"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(state, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        trainer.load(path)
