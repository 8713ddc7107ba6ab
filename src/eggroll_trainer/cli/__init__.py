"""The command ``eggroll``."""

from .main import main

__all__ = ["main"]
