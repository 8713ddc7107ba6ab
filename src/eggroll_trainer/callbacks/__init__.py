"""What watches a run."""

from .progress import Progress

__all__ = ["Progress"]
