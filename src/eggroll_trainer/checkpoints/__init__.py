"""Checkpoints: files from which a run can be resumed or replayed."""

from .folder import Checkpoints
from .score_log import ScoreLog

__all__ = ["Checkpoints", "ScoreLog"]
