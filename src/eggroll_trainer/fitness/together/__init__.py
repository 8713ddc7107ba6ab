"""Runs a plain fitness function for many members together: they take turns, on the same model object."""

from .deadlock import Deadlock, DeadlockWatch
from .members import DEADLOCK, MemberFailed, NotTogether, refuse_nested, scores

__all__ = ["DEADLOCK", "Deadlock", "MemberFailed", "NotTogether", "DeadlockWatch", "refuse_nested", "scores"]
