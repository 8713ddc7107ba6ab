"""Language models: a reward, or a likelihood, as the fitness of a whole population."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("eggroll_trainer.llm needs transformers: pip install 'eggroll_trainer[llm]'")

from .best_of import pass_at_k
from .evaluation import EvaluationResult
from .likelihood import LogLikelihood, Perplexity
from .parameters import trainable_parameters
from .reward import CompletionReward

__all__ = [
    "CompletionReward",
    "EvaluationResult",
    "LogLikelihood",
    "Perplexity",
    "pass_at_k",
    "trainable_parameters",
]
