"""Rules: what operations do with a perturbed parameter. Importing a module of rules registers them."""

from . import attention, conv, embedding, linear, products, recurrent, values

__all__ = ["attention", "conv", "embedding", "linear", "products", "recurrent", "values"]
