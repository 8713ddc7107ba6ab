"""Rules: how operations compute with a perturbed parameter. Importing a module registers its rules."""

from . import attention, conv, embedding, linear, products, recurrent, values

__all__ = ["attention", "conv", "embedding", "linear", "products", "recurrent", "values"]
