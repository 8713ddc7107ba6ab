"""Perturbation of parameters: how members differ from the centre, and how operations use that."""

# Importing a module of rules registers them.
from .rules import attention, conv, embedding, linear, products, recurrent, values
from .tensor import BatchingRules, DenseParameter, PerturbedTensor, dense_sum, densify

__all__ = [
    "BatchingRules",
    "DenseParameter",
    "PerturbedTensor",
    "attention",
    "conv",
    "dense_sum",
    "densify",
    "embedding",
    "linear",
    "products",
    "recurrent",
    "values",
]
