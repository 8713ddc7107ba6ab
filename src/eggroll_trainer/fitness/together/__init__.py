"""Members of a population taking turns in a plain fitness function, on one and the same model object."""

from .deadlock import Deadlock, Watch
from .members import DEADLOCK, MemberFailed, NotTogether, refuse_nested, scores

__all__ = ["DEADLOCK", "Deadlock", "MemberFailed", "NotTogether", "Watch", "refuse_nested", "scores"]
