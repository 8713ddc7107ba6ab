"""Perturbation of parameters: how members differ from the centre, and how operations use that."""

from . import linear
from .tensor import BatchingRules, PerturbedTensor, dense_sum, densify

__all__ = ["BatchingRules", "PerturbedTensor", "dense_sum", "densify", "linear"]
