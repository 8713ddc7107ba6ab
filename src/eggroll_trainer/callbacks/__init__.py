"""What watches a run."""

from ..checkpoints.folder import Checkpoints
from ..checkpoints.score_log import ScoreLog
from .progress import Progress

__all__ = ["Checkpoints", "Progress", "ScoreLog"]
