"""The population: the model, run for all members at once."""

from .audit import Audit
from .population import Population
from .whole import WholePopulation

__all__ = ["Audit", "Population", "WholePopulation"]
