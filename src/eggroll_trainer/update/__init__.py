"""Update: from weighted perturbations to the next centre."""

from .centre import Centre
from .schedule import LRSchedulerFactory, Schedules

__all__ = ["Centre", "LRSchedulerFactory", "Schedules"]
