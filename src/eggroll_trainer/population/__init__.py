"""The population: a model for every member at once."""

from .audit import Audit
from .population import Population
from .whole import WholePopulation

__all__ = ["Audit", "Population", "WholePopulation"]
