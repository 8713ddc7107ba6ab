"""Update: from weighted perturbations to the next centre."""

from .centre import Centre
from .optimizers import OptimizerFactory
from .schedule import LRSchedulerFactory, Schedules

__all__ = ["Centre", "LRSchedulerFactory", "OptimizerFactory", "Schedules"]
