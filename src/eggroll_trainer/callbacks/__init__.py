"""What watches a run."""

from .checkpoints import Checkpoints
from .progress import Progress
from .score_log import ScoreLog

__all__ = ["Checkpoints", "Progress", "ScoreLog"]
