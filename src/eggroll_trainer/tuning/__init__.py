"""Settings that suit a model and its fitness function, found by trying them."""

from .result import RateTrial, SigmaTrial, Tuning
from .tune import tune

__all__ = ["RateTrial", "SigmaTrial", "Tuning", "tune"]
