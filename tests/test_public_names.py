"""Every public name is on a page of the API reference, and has a docstring that says what is needed to use it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    *("eggroll_trainer", "eggroll_trainer.callbacks", "eggroll_trainer.plotting", "eggroll_trainer.distributed"),
    "eggroll_trainer.llm",
]
# Methods that a page lists by name besides those that their class defines itself.
_ENTRY = re.compile(r"^::: (?P<path>[\w.]+)(?P<options>(?:\n {4}.*)*)", re.MULTILINE)
# Data, protocols and abstract classes: what they are is said, and used in the examples of others.
# What needs a server or a screen has tests of its own.
WITHOUT_EXAMPLE = {
    "MLflow",
    "WeightsAndBiases",
    "record",
    "Chunk",
    "Engine",
    "EvaluationResult",
    "Evaluator",
    "LocalEngine",
    "Outcome",
    "Policy",
    "Progress",
    "Settings",
    "Simulator",
    "Step",
}


def entries() -> Iterator[tuple[str, str]]:
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for match in _ENTRY.finditer(page.read_text()):
            yield match["path"], match["options"]


def resolve(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    needs = {"rl": "gymnasium", "llm": "transformers", "ray_engine": "ray"}
    for part, package in needs.items():
        if part in module.split("."):
            pytest.importorskip(package)
    return getattr(importlib.import_module(module), name)


def missing(name: str, value: Any, documented_at_class: bool = False) -> Iterator[str]:
    """Yield what the docstring of a function, a property or a class lacks."""
    text = inspect.getdoc(value) or ""
    if not text:
        yield f"{name} has no docstring"
        return
    if isinstance(value, property):
        return
    if inspect.isclass(value) and (
        value.__init__ is object.__init__ or hasattr(value, "_fields") or dataclasses.is_dataclass(value)
    ):
        # What tuples and dataclasses hold is described beside each field.
        return
    try:
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
    except ValueError:
        return
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # One argument may be described by the sentence itself; several want a list.
    if len(named) > 1 and "Takes the arguments of" not in text:
        listed = re.findall(r"^ {4}(\w+)(?: \(.*\))?: ", text, re.MULTILINE)
        absent = [parameter for parameter in named if parameter not in listed and f"``{parameter}``" not in text]
        if absent:
            yield f"{name} does not describe {', '.join(absent)}"
    if not inspect.isclass(value):
        returns = inspect.signature(value).return_annotation
        says = re.search(r"^(Returns|Yields):|[Rr]eturn|Yield|Whether", text, re.MULTILINE)
        if returns not in (None, "None", inspect.Signature.empty) and not says:
            yield f"{name} does not say what it returns"


def members(cls: type, options: str) -> Iterator[tuple[str, Any]]:
    """Yield what the page shows of a class: the members that it lists, or those that are the class's own."""
    listed = re.search(r"members: \[(.*)\]", options.replace("inherited_members", ""))
    for name in listed[1].split(", ") if listed else list(vars(cls)):
        value = inspect.getattr_static(cls, name, None)
        overrides = any(hasattr(base, name) for base in cls.__mro__[1:])
        if not name.startswith("_") and not overrides and isinstance(value, types.FunctionType | property):
            yield name, value


@pytest.mark.parametrize(("path", "options"), list(entries()))
def test_docstring(path: str, options: str) -> None:
    value = resolve(path)
    name = path.rsplit(".", 1)[1]
    found = list(missing(name, value))
    if name not in WITHOUT_EXAMPLE and ">>>" not in (inspect.getdoc(value) or ""):
        found.append(f"{name} has no example")
    if inspect.isclass(value):
        for member, attribute in members(value, options):
            found += missing(f"{name}.{member}", attribute)
    assert not found


def test_listed_members_exist() -> None:
    for path, options in entries():
        for listed in re.findall(r"members: \[(.+)\]", options):
            for member in listed.split(", "):
                assert hasattr(resolve(path), member), (path, member)


def test_every_public_name_is_on_a_page() -> None:
    on_pages = {path.rsplit(".", 1)[1] for path, _ in entries()}
    for package in PACKAGES:
        if package.endswith("llm"):
            pytest.importorskip("transformers")
        # Callbacks is a type.
        assert set(importlib.import_module(package).__all__) - {"Callbacks"} <= on_pages, package
