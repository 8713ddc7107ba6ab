"""Language models: rewards and likelihoods as fitness functions for a whole population."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("eggroll_trainer.llm needs transformers: pip install 'eggroll_trainer[llm]'")

from .best_of import pass_at_k
from .evaluation import EvaluationResult
from .export import changes_of, save_merged, weights_of, write_update
from .likelihood import LogLikelihood, Perplexity
from .members import write_adapters
from .parameters import trainable_parameters
from .quantised import batch_quantised_layers
from .reward import CompletionReward

__all__ = [
    "CompletionReward",
    "EvaluationResult",
    "LogLikelihood",
    "Perplexity",
    "batch_quantised_layers",
    "changes_of",
    "pass_at_k",
    "save_merged",
    "trainable_parameters",
    "weights_of",
    "write_adapters",
    "write_update",
]
