"""The population: a model for every member at once."""

from .population import Audit, Population
from .whole import WholePopulation

__all__ = ["Audit", "Population", "WholePopulation"]
