"""Functions that a command line names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def function_named(option: str, name: str) -> Callable[..., Any]:
    """Return the function that ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` names; modules may lie in this folder.

    Args:
        option: What names it, for messages.
        name: Its name.

    Raises:
        ValueError: There is no such module or function.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"{option} must be MODULE:FUNCTION or FILE.py:FUNCTION, got {name!r}")
    function = getattr(_module(option, where), attribute, None)
    if not callable(function):
        found = "no function" if function is None else f"a {type(function).__name__}"
        raise ValueError(f"{option} {name}: {attribute!r} is {found} in {where}")
    return function


def _module(option: str, where: str) -> ModuleType:
    path = Path(where).resolve() if where.endswith(".py") else None
    if path is not None and not path.exists():
        raise ValueError(f"{option}: there is no file {where}")
    # A script that pip has installed does not look in the current folder.
    folder = os.getcwd() if path is None else str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # A file by its own name, so that other processes can import what is in it.
    name = where if path is None else path.stem
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that the module itself lacks is another matter.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{option}: there is no module {name!r} in {folder}, nor among those installed") from error
    if path is not None and (module.__file__ is None or Path(module.__file__).resolve() != path):
        raise ValueError(f"{option}: there is another module of the name {name!r}; rename the file {where}")
    return module
