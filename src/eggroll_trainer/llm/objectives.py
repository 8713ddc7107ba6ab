"""The objectives of ``eggroll llm``: the fitness of members, and the evaluation of the centre."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import Population, batched
from ..noise.keys import derive_seed
from .completions import Completer, Decoding
from .evaluation import EvaluationResult
from .examples import Example
from .likelihood import LogLikelihood, Perplexity
from .models import evaluating
from .reward import CompletionReward
from .scoring import LikelihoodResult, TeacherForced
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation of the centre.

    Attributes:
        figures: Numbers by name.
        completions: Some of the centre's completions: prompt, completions, and rewards if there are any.
        summary: The figures and some completions as text.
    """

    figures: dict[str, float]
    completions: list[dict[str, Any]]
    summary: str


class MeanOverPrompts:
    """Fitness function: the mean of another function's scores over the prompts, ``[N, K] → [N]``.

    Members are then compared by their means only: weights have unit spread, even if members rank differently on
    different prompts. All other attributes are those of the other function.

    Args:
        fitness: A fitness function for populations.
    """

    def __init__(self, fitness: Any) -> None:
        self.fitness = fitness
        # Keep the other function's choice of checks.
        batched(self, check=fitness._eggroll_batched == "checked")

    def __call__(self, population: Population) -> Tensor:
        """Return the mean score of every member, ``[N]``."""
        scores: Tensor = self.fitness(population).mean(1)
        return scores

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the other function, such as its metrics."""
        if name.startswith("__") or "fitness" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.fitness, name)


class Objective(ABC):
    """An objective to maximise.

    Args:
        settings: The settings of the run.
        tokenizer: The model's tokenizer.

    Attributes:
        fitness: The fitness function for populations.
        figure: Name of the figure in evaluations that training maximises.
    """

    fitness: Any
    figure = "score"

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> Evaluated:
        """Evaluate one model."""

    def shaped(self, fitness: Any) -> Any:
        """Return a fitness function that compares members as the settings say."""
        return MeanOverPrompts(fitness) if self.settings.compare == "mean" else fitness


class RewardObjective(Objective):
    """The reward of completions.

    Args:
        settings: The settings of the run.
        tokenizer: The model's tokenizer.
        examples: The training examples.
        functions: The reward functions.
        reference: The reference model of divergences, or None.
    """

    figure = "reward"

    def __init__(
        self,
        settings: Settings,
        tokenizer: Any,
        examples: Sequence[Example],
        functions: Sequence[Callable[..., Any]],
        reference: nn.Module | None,
    ) -> None:
        super().__init__(settings, tokenizer)
        self.reward = CompletionReward(
            tokenizer,
            examples,
            functions,
            prompts_per_generation=settings.prompts_per_generation,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            samples_per_prompt=settings.samples_per_prompt,
            pass_at_k=settings.pass_at_k,
            reward_weights=settings.reward_weights or None,
            prompt_key=settings.prompt_key,
            kl_penalty=settings.kl_penalty,
            reference=reference,
            prompts_per_call=settings.prompts_per_call,
        )
        self.fitness = self.shaped(self.reward)

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> Evaluated:
        """Reward one model's completions."""
        settings = self.settings
        found = self.reward.evaluate(
            model,
            examples,
            settings.eval_examples,
            samples_per_prompt=settings.eval_samples,
            temperature=settings.eval_temperature,
            batch_size=settings.eval_batch_size,
            seed=derive_seed("evaluation", settings.seed),
        )
        rows = zip(found.prompts, found.completions, found.rewards.tolist(), strict=True)
        shown = [{"prompt": p, "completions": c, "rewards": r} for p, c, r in list(rows)[: settings.show]]
        return Evaluated(_figures(found), shown, str(found))


def _figures(found: EvaluationResult) -> dict[str, float]:
    figures = {"reward": found.reward, "completion_length": found.length, "ended": found.ended}
    figures |= {f"rewards/{name}": value for name, value in found.each.items()}
    figures |= {f"pass@{k}": value for k, value in found.pass_at_k.items() if k > 1}
    return figures if found.kl is None else {**figures, "kl": found.kl}


class LikelihoodObjective(Objective):
    """The log-probability of given answers; see :class:`RewardObjective` for the arguments."""

    def __init__(self, settings: Settings, tokenizer: Any, examples: Sequence[Example]) -> None:
        super().__init__(settings, tokenizer)
        self._scored = LogLikelihood(
            tokenizer,
            examples,
            prompts_per_generation=settings.prompts_per_generation,
            prompt_key=settings.prompt_key,
            answer_key=settings.answer_key,
        )
        self._completer = Completer(tokenizer, Decoding(settings.max_new_tokens))
        self.fitness = self.shaped(self._scored)

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> Evaluated:
        """Score one model's answers, and let it complete some prompts."""
        found = _scores(self._scored, self.settings, model, examples)
        prompts = [example[self.settings.prompt_key] for example in examples[: self.settings.show]]
        texts = []
        if prompts:
            with evaluating(model):
                tokens = [self._scored.encoder(prompt) for prompt in prompts]
                texts = [completion.text for completion in self._completer.by_model(model, tokens, 1)]
        shown = [{"prompt": p, "completions": [text]} for p, text in zip(prompts, texts, strict=True)]
        return Evaluated(_likelihoods(found), shown, str(found))


class PerplexityObjective(Objective):
    """The log-probability of texts; see :class:`RewardObjective` for the arguments."""

    def __init__(self, settings: Settings, tokenizer: Any, examples: Sequence[Example]) -> None:
        super().__init__(settings, tokenizer)
        self._scored = Perplexity(
            tokenizer,
            examples,
            texts_per_generation=settings.prompts_per_generation,
            text_key=settings.text_key,
            max_length=settings.max_length,
        )
        self.fitness = self.shaped(self._scored)

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> Evaluated:
        """Score texts by one model."""
        found = _scores(self._scored, self.settings, model, examples)
        return Evaluated(_likelihoods(found), [], str(found))


def make_objective(
    settings: Settings,
    tokenizer: Any,
    examples: Sequence[Example],
    functions: Sequence[Callable[..., Any]],
    reference: nn.Module | None,
) -> Objective:
    """Return the objective that the settings name."""
    if settings.objective == "likelihood":
        return LikelihoodObjective(settings, tokenizer, examples)
    if settings.objective == "perplexity":
        return PerplexityObjective(settings, tokenizer, examples)
    return RewardObjective(settings, tokenizer, examples, functions, reference)


def _scores(
    fitness: TeacherForced, settings: Settings, model: nn.Module, examples: Sequence[Example]
) -> LikelihoodResult:
    return fitness.evaluate(model, examples, settings.eval_examples, batch_size=settings.eval_batch_size)


def _likelihoods(found: LikelihoodResult) -> dict[str, float]:
    return {"score": found.score, "perplexity": found.perplexity}
