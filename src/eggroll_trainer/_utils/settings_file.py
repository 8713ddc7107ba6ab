"""Reads the settings of a command from a file: ``--config FILE``."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")

HELP = (
    "--config FILE takes the settings from a file, such as the config.json of a run; options that follow override it."
)

# Settings that are not taken over from the config.json of another run.
_PLACES = ("out", "resume")


def without_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the file from ``--config FILE``, or None, and the other arguments.

    Raises:
        ValueError: The name of the file is missing.
    """
    for i, argument in enumerate(arguments):
        option, equals, file = argument.partition("=")
        if option == "--config":
            if not equals and i + 1 == len(arguments):
                raise ValueError("--config needs the name of a file")
            rest = arguments[i + 1 :] if equals else arguments[i + 2 :]
            return file if equals else arguments[i + 1], [*arguments[:i], *rest]
    return None, arguments


def read_settings(file: str, kind: type, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings in a JSON file, as values of the fields of a dataclass.

    Args:
        file: The file, or the folder of a run, which contains a ``config.json``.
        kind: The dataclass.
        ignored: Further names in the file, which are ignored.

    Raises:
        ValueError: There is no such file, it does not contain a JSON object, or there is an unknown setting in it.
    """
    path = Path(file)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file} must be an object with settings, got {type(values).__name__}")
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    found = {}
    for name, value in values.items():
        if name in _PLACES or name in ignored:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ValueError(
                f"--config {file}: there is no setting {name!r}{f'; did you mean {near[0]}?' if near else ''}"
            )
        found[name] = _as(value, hints[name])
    return found


def _as(value: Any, hint: Any) -> Any:
    """Convert a JSON value to the type of a field."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and "Path" in str(hint):
        return Path(value)
    return value
