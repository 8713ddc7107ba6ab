"""Tuning: finds settings that suit a model and its fitness function, by trials."""

from .result import RateTrial, SigmaTrial, Tuning
from .tune import tune

__all__ = ["RateTrial", "SigmaTrial", "Tuning", "tune"]
