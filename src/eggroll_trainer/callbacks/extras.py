"""Imports optional packages that some callbacks need."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, what: str, package: str) -> Any:
    """Import a module; if that fails, the error says what to install.

    Args:
        module: Name of the module.
        what: Name of the callback that needs it.
        package: The package that contains it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}: pip install {package}, or pip install 'eggroll_trainer[logging]' ({error})"
        ) from error
