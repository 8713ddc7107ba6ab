"""The population: a model for every member at once."""

from .population import Audit, Population

__all__ = ["Audit", "Population"]
