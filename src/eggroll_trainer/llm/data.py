"""Loads data sets that are named on a command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._utils.importing import function_named
from ..noise.keys import keyed_generator
from .examples import Example

_FILES = (".jsonl", ".json", ".csv")


def load_examples(option: str, source: str, column: str) -> list[Example]:
    """Return the rows of a ``.jsonl``, ``.json`` or ``.csv`` file, or those that ``MODULE:FUNCTION`` returns.

    Args:
        option: The command-line option, for messages.
        source: The file or function. A function may return any sequence of mappings, or of texts.
        column: The column of the prompt, or of the text.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The function has raised an exception.
        ValueError: The source is of another kind, has no rows, or has a malformed row.
    """
    suffix = Path(source).suffix.lower()
    if suffix in _FILES:
        if not Path(source).exists():
            raise FileNotFoundError(f"{option}: there is no file {source}")
        rows = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}[suffix](option, Path(source))
    elif ":" in source:
        rows = _returned(option, source)
    else:
        raise ValueError(f"{option} must be a {', '.join(_FILES)} file or MODULE:FUNCTION, got {source!r}")
    if not rows:
        raise ValueError(f"{option}: {source} has no rows")
    rows = [{column: row} if isinstance(row, str) else row for row in rows]
    return [_checked(option, source, i, row, rows[0]) for i, row in enumerate(rows)]


def _returned(option: str, source: str) -> list[Any]:
    function = function_named(option, source)
    try:
        rows = function()
        whole = isinstance(rows, (Mapping, str)) or not isinstance(rows, Iterable)
        listed = [] if whole else list(rows)
    except Exception as error:
        # Not a ValueError, which commands report as a wrong argument, without the traceback.
        raise RuntimeError(f"{option}: {source} raised {type(error).__name__}") from error
    if whole:
        hint = "; return one of its splits" if isinstance(rows, Mapping) else ""
        raise ValueError(f"{option}: {source} must return a list of dicts, got a {type(rows).__name__}{hint}")
    return listed


def _json_lines(option: str, path: Path) -> list[Any]:
    rows = []
    # Not splitlines(), as JSON strings may contain Unicode line breaks.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{option}: line {number} of {path} is not JSON: {error}") from error
    return rows


def _json(option: str, path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{option}: {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{option}: {path} must hold a list of objects, got a {type(rows).__name__}")
    return rows


def _csv(option: str, path: Path) -> list[Any]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader, rows = csv.DictReader(file), []
        for row in reader:
            # DictReader marks missing values by a value None, and surplus values by a key None.
            if None in row or None in row.values():
                raise ValueError(
                    f"{option}: line {reader.line_num} of {path} has another number of values than the first line"
                )
            rows.append(row)
        return rows


def _checked(option: str, source: str, index: int, row: Any, first: Any) -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"{option}: row {index} of {source} must be an object with columns, got {type(row).__name__}")
    if isinstance(first, Mapping) and row.keys() != first.keys():
        name = min(row.keys() ^ first.keys())
        raise ValueError(
            f"{option}: the column {name!r} is in row {index if name in row else 0} of {source} and not in row"
            f" {0 if name in row else index}; all rows must have the same columns"
        )
    return dict(row)


def check_columns(option: str, source: str, examples: Sequence[Example], keys: Mapping[str, str]) -> None:
    """Check that a data set has some columns.

    Args:
        option: The command-line option of the data set, for messages.
        source: Its file or function, for messages.
        examples: Its rows.
        keys: The columns, by the command-line options that name them.

    Raises:
        ValueError: A column is missing.
    """
    for key_option, key in keys.items():
        if key not in examples[0]:
            raise ValueError(
                f"{option}: {source} has no column {key!r}; its columns are {', '.join(map(repr, examples[0]))}. Name"
                f" the right one with {key_option}"
            )


def as_conversations(examples: Sequence[Example], key: str, system: str | None) -> list[Example]:
    """Return examples in which prompts that are texts become a user's message, after a system message if given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        {**example, key: [*before, {"role": "user", "content": example[key]}]}
        if isinstance(example[key], str)
        else example
        for example in examples
    ]


def held_out(examples: Sequence[Example], key: str, fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples at random into those to train on and those to evaluate on.

    Examples with the same prompt stay together, so that no prompt of an evaluation is trained on.

    Args:
        examples: All examples.
        key: The column of the prompt.
        fraction: Share of the prompts to evaluate on; each side gets at least one. With 0, both sides get all examples.
        seed: Seed of the run.

    Raises:
        ValueError: ``fraction`` is not in [0, 1), or all prompts are the same.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return list(examples), list(examples)
    prompts = [json.dumps(example[key], sort_keys=True, default=str) for example in examples]
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise ValueError(
            "the data have only one prompt, so none can be held out: pass eval_data, or eval_fraction=0 to evaluate on"
            " the training data"
        )
    order = torch.randperm(len(distinct), generator=keyed_generator("held out", seed), device="cpu").tolist()
    count = min(len(distinct) - 1, max(1, math.floor(fraction * len(distinct) + 0.5)))
    chosen = {distinct[i] for i in order[:count]}
    pairs = list(zip(examples, prompts, strict=True))
    return [row for row, prompt in pairs if prompt not in chosen], [row for row, prompt in pairs if prompt in chosen]
