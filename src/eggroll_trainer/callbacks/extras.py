"""Packages that some callbacks need, and that are not installed with the library."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, what: str, package: str) -> Any:
    """Import a module, or say what to install.

    Args:
        module: Its name.
        what: What needs it.
        package: The package it is in.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}: pip install {package}, or pip install 'eggroll_trainer[logging]' ({error})"
        ) from error
