"""Train PyTorch models without gradients, by evolution strategies with low-rank perturbations (EGGROLL)."""

from .base import ESTrainer
from .eggroll import EGGROLLTrainer
from .fitness.evaluate import batched
from .population import Population
from .vanilla import VanillaESTrainer

__all__ = ["EGGROLLTrainer", "ESTrainer", "Population", "VanillaESTrainer", "batched"]
__version__ = "0.1.0"
