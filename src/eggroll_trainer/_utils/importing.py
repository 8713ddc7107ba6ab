"""Imports functions that are named on a command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def function_named(option: str, name: str) -> Callable[..., Any]:
    """Import the function ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``; modules may be in the current folder.

    Args:
        option: The command-line option, for messages.
        name: The name of the function.

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
    # Scripts installed by pip don't have the current folder on their path.
    folder = os.getcwd() if path is None else str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Import a file under its own name, so that other processes can import it too.
    name = where if path is None else path.stem
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Errors about imports inside the module are raised unchanged.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{option}: there is no module {name!r} in {folder}, nor among those installed") from error
    if path is not None and (module.__file__ is None or Path(module.__file__).resolve() != path):
        raise ValueError(f"{option}: there is another module named {name!r}; rename the file {where}")
    return module
