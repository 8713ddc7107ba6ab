"""Members of a population taking turns in a plain fitness function, on one and the same model object."""

from .members import MemberFailed, NotTogether, refuse_nested, scores

__all__ = ["MemberFailed", "NotTogether", "refuse_nested", "scores"]
