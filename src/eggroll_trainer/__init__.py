"""Train PyTorch models without gradients, by evolution strategies with low-rank perturbations (EGGROLL)."""

from .fitness.evaluate import batched
from .population import Population
from .trainers.base import ESTrainer
from .trainers.eggroll import EGGROLLTrainer
from .trainers.vanilla import VanillaESTrainer
from .tuning import tune

__all__ = ["EGGROLLTrainer", "ESTrainer", "Population", "VanillaESTrainer", "batched", "tune"]
__version__ = "0.1.0"
