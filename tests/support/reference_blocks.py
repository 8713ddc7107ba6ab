"""The code blocks of the documents in ``tests/reference``, cut out of them and never retyped.

Two documents have lost the indentation of their code, one of them line breaks too: `DEPTHS` and `JOINED` put back that
whitespace and nothing else.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).parent.parent / "reference"

TRAINERS = ("trainers.md", "trainers_positional.txt")
TRAINERS_BLOCKS = (
    "required methods",
    "custom trainer",
    "vanilla usage",
    "eggroll usage",
    "basic training",
    "progress tracking",
    "history",
    "best model",
)
# Counted by hand, in the order of the document.
NAMES = {
    "trainers.md": TRAINERS_BLOCKS,
    "trainers_positional.txt": TRAINERS_BLOCKS,
    "es_trainer_api.txt": (
        "signature",
        "required methods",
        "sample_perturbations",
        "compute_update",
        "custom trainer",
    ),
    "front_page.txt": ("quick start",),
    "core_concepts.txt": ("low-rank formula",),
}

# Unfenced code without blank lines: the line above its first and the line below its last (None: the end).
EDGES: dict[str, list[tuple[str, str | None]]] = {
    "es_trainer_api.txt": [
        ("ESTrainer ¶", "Bases: Optimizer, ABC"),
        ("Example", "Initialize the ES trainer."),
        ("sample_perturbations¶", "compute_update¶"),
        ("compute_update¶", "Example¶"),
        ("Example¶", None),
    ],
    "front_page.txt": [("Quick Start¶", "Installation¶")],
    "core_concepts.txt": [("Low-Rank ES (EGGROLLTrainer)¶", "Memory: O(r(m+n)) per population member")],
}

# Indentation of the blocks that lost theirs: one digit a line, its depth in steps of four spaces.
DEPTHS = {
    ("es_trainer_api.txt", "required methods"): "0122" + "122",
    ("es_trainer_api.txt", "sample_perturbations"): "0" + "1112122" + "11",
    ("es_trainer_api.txt", "compute_update"): "01110" + "111221211",
    ("es_trainer_api.txt", "custom trainer"): "000" + "1223332" + "122322",
    ("front_page.txt", "quick start"): "000" + "00122212" + "00111" + "00" + "01111111" + "0" + "00",
}

# The one block of which lines were joined: where its first line breaks again.
JOINED = ("es_trainer_api.txt", "required methods")
LINE_BREAK = re.compile(r" (?=def |# |pass$)")

# What each block leaves to its reader. A block runs with these names and no others.
NEEDS = {
    "signature": "ESTrainer params model fitness_fn",
    "required methods": "ESTrainer",
    "sample_perturbations": "Tensor",
    "compute_update": "Tensor",
    "custom trainer": "",
    "vanilla usage": "model fitness_fn",
    "eggroll usage": "model fitness_fn",
    "basic training": "trainer",
    "progress tracking": "trainer",
    "history": "trainer",
    "best model": "trainer",
    "quick start": "",
    "low-rank formula": "torch m n r sigma W",
}


@dataclass(frozen=True)
class Block:
    """Lines `start` to `stop` (from 0, `stop` excluded) of a document, and the program they stand for."""

    document: str
    name: str
    start: int
    stop: int

    @property
    def lines(self) -> list[str]:
        return lines_of(self.document)[self.start : self.stop]

    @property
    def source(self) -> str:
        key = (self.document, self.name)
        lines = self.lines
        if key == JOINED:
            lines = LINE_BREAK.split(lines[0]) + lines[1:]
        if key in DEPTHS:
            lines = ["    " * int(d) + line for d, line in zip(DEPTHS[key], lines, strict=True)]
        return "\n".join(lines) + "\n"

    def run(self, **supplied: Any) -> dict[str, Any]:
        """Execute the block and return its namespace; a traceback points into the document."""
        assert set(supplied) == set(NEEDS[self.name].split())
        namespace: dict[str, Any] = {"__name__": "reference", **supplied}
        exec(compile("\n" * self.start + self.source, str(REFERENCE / self.document), "exec"), namespace)
        return namespace


def lines_of(document: str) -> list[str]:
    return (REFERENCE / document).read_text(encoding="utf-8").splitlines()


def fenced(lines: list[str]) -> Iterator[tuple[int, int]]:
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        assert lines[opening] == "```python" and lines[closing] == "```"
        yield opening + 1, closing


def unfenced(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Runs of paragraphs that are code. A heading of one word parses too, but only as a bare name."""
    span = None
    ends = [i for i, line in enumerate([*lines, ""]) if not line.strip()]
    for start, stop in zip([0, *(i + 1 for i in ends)], ends, strict=False):
        if start == stop:
            continue
        try:
            body = ast.parse(textwrap.dedent("\n".join(lines[start:stop]))).body
            code = not all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Name) for s in body)
        except SyntaxError:
            code = False
        if code:
            span = (span[0] if span else start, stop)
        elif span:
            yield span
            span = None
    if span:
        yield span


def between(lines: list[str], edges: list[tuple[str, str | None]]) -> Iterator[tuple[int, int]]:
    for above, below in edges:
        start = lines.index(above) + 1
        yield start, len(lines) if below is None else lines.index(below, start)


def spans(document: str) -> list[tuple[int, int]]:
    lines = lines_of(document)
    if document in EDGES:
        return list(between(lines, EDGES[document]))
    return list(fenced(lines) if document.endswith(".md") else unfenced(lines))


BLOCKS = {
    (document, name): Block(document, name, *span)
    for document, names in NAMES.items()
    for name, span in zip(names, spans(document), strict=False)
}


def cases(*names: str) -> pytest.MarkDecorator:
    """Parametrise over every block that bears one of the names."""
    blocks = [block for block in BLOCKS.values() if not names or block.name in names]
    return pytest.mark.parametrize("block", blocks, ids=[f"{b.document}: {b.name}" for b in blocks])
