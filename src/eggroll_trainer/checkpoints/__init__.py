"""Checkpoints: what a run is kept in, and gone on from."""

from .folder import Checkpoints
from .score_log import ScoreLog

__all__ = ["Checkpoints", "ScoreLog"]
