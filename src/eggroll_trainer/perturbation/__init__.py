"""Perturbation of parameters: how members differ from the centre, and how operations use perturbed parameters."""

# Importing a module of rules registers its rules.
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
