"""The fitness of a language model: the reward of its completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import Population, batched
from .._utils.validation import check_int, check_real
from ..noise.keys import forked_rng
from .best_of import pass_at_k as expected_best
from .completions import Completer, Completion, Decoding
from .divergence import Divergence
from .evaluation import EvaluationResult, Tally
from .examples import Example, Examples
from .models import cache_bytes, device_of, evaluating, logit_bytes
from .prompts import PromptEncoder
from .reward_functions import RewardFunction, RewardFunctions

T = TypeVar("T")

# Number of prompts from which the longest length is estimated.
_LOOKED_AT = 64


class CompletionReward:
    """Fitness function: the reward of a language model's completions, generated for all members at once.

    Each generation draws prompts from the data set, the same for all members in all processes. They depend on the run's
    seed and the generation. There is one score for each prompt, ``[N, K]``, so that members are compared prompt by
    prompt. Sampled tokens depend on the seed, the generation, the member and the prompts, but not on other members.

    Reward functions have the signature of TRL's: ``reward_fn(prompts, completions, **columns)``. They are called with
    keyword arguments: a list for each column of the data set, and ``completion_ids``, the tokens of the completions.
    They return a list of numbers, with None for completions to which they do not apply. Prompts and completions are
    texts; if prompts are conversations, they are lists of messages.

    Args:
        tokenizer: A tokenizer of transformers.
        dataset: A list of dicts, a ``datasets.Dataset`` or another sequence of mappings; or a list of prompts.
        reward_fn: A reward function, or a list of several, whose rewards are added.
        prompts_per_generation: ``K``. More prompts make scores less noisy, and cost as much as more members. 8 is a
            fair start.
        max_new_tokens: Tokens after which a completion is cut off.
        temperature: 0 for greedy completions, so that a member's score depends on its weights only. Perturbed weights
            suffice to explore. Above 0 to sample.
        top_p: Sample from the likeliest tokens with this total probability.
        top_k: Sample from this number of likeliest tokens; 0 for all.
        samples_per_prompt: ``S``, the number of completions of each prompt by each member, over which rewards are
            averaged. More than one needs a temperature above 0.
        pass_at_k: Score a prompt by the expected best reward of ``k ≤ S`` samples instead of the mean; see
            :func:`~eggroll_trainer.llm.pass_at_k`. Use it if the model may try several times in practice.
        reward_weights: A weight for each reward function; 1 if None.
        prompt_key: The column of the prompt: a text, or a list of messages ``{"role": …, "content": …}``, which are
            formatted with the tokenizer's chat template.
        chat_template_kwargs: Keyword arguments of the chat template.
        kl_penalty: ``β``: scores are ``reward - β·KL``, with the divergence from the reference model in nats per
            completion; see :class:`~eggroll_trainer.llm.divergence.Divergence`. It costs one more forward of the
            members and one of the reference.
        reference: The reference model of the divergence, such as ``copy.deepcopy(model)`` before training. If None and
            the model is a PEFT model, that model without its adapters.
        prompts_per_call: Prompts in one call of ``generate()``, for all members of a chunk; all if None. Fewer prompts
            take less memory for caches, as does a smaller ``chunk_size`` of the trainer.
        logits_budget: Bytes for logits when divergences are computed.
        generation_kwargs: Further keyword arguments of ``generate()``, such as ``{"stop_strings": ["###"]}``.
        check: Whether to compare members, now and then, with the model with their weights.

    Attributes:
        metrics: Means over all completions of the last generation: ``reward``, ``rewards/NAME`` for each reward
            function, ``completion_length`` in tokens, ``ended`` (the share of completions within ``max_new_tokens``),
            and ``kl`` if there is a penalty.
        tokens: Number of tokens generated in all completed generations.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, a column is missing, or a reward function needs an argument that is not
            available.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "say": 1, "yes": 2, "no": 3}, unk_token="no"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> sizes = dict(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
        >>> def says_yes(prompts, completions, **columns):
        ...     return [completion.split().count("yes") for completion in completions]
        >>> reward = CompletionReward(tokenizer, ["say yes"], says_yes, prompts_per_generation=1, max_new_tokens=4)
        >>> trainer = EGGROLLTrainer(
        ...     model=model, fitness_fn=reward, population_size=32, sigma=0.05, learning_rate=1.0, noise_reuse=2, seed=0
        ... )
        >>> result = trainer.train(2, verbose=False)
        >>> sorted(reward.metrics)
        ['completion_length', 'ended', 'reward', 'rewards/says_yes']
        >>> reward.evaluate(model).completions
        [['yes yes yes yes']]
    """

    # Its statistics are its own attributes, not buffers of the model.
    changes_model = False

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        reward_fn: RewardFunction | Sequence[RewardFunction],
        *,
        prompts_per_generation: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        samples_per_prompt: int = 1,
        pass_at_k: int | None = None,
        reward_weights: Sequence[float] | None = None,
        prompt_key: str = "prompt",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        kl_penalty: float = 0.0,
        reference: nn.Module | None = None,
        prompts_per_call: int | None = None,
        logits_budget: int = 2**28,
        generation_kwargs: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        decoding = Decoding(max_new_tokens, temperature, top_p, top_k, dict(generation_kwargs or {}))
        self.encoder = PromptEncoder(tokenizer, chat_template_kwargs)
        self.completer = Completer(tokenizer, decoding)
        self.prompt_key = prompt_key
        self.examples = Examples(dataset, [prompt_key])
        self.prompts_per_generation = self.examples.check_count("prompts_per_generation", prompts_per_generation)
        self.prompts_per_call = (
            self.prompts_per_generation
            if prompts_per_call is None
            else check_int("prompts_per_call", prompts_per_call, 1)
        )
        self.samples_per_prompt = check_samples(samples_per_prompt, decoding)
        self.pass_at_k = None if pass_at_k is None else check_int("pass_at_k", pass_at_k, 1)
        if self.pass_at_k is not None and self.pass_at_k > self.samples_per_prompt:
            raise ValueError(
                f"pass_at_k={pass_at_k} needs as many samples: pass samples_per_prompt={pass_at_k} or more, got"
                f" {samples_per_prompt}"
            )
        self.kl_penalty = check_real("kl_penalty", kl_penalty, positive=False)
        if reference is not None and not isinstance(reference, nn.Module):
            raise TypeError(f"reference must be a torch.nn.Module, got {type(reference).__name__}")
        self.divergence = Divergence(tokenizer, reference, check_int("logits_budget", logits_budget, 1))
        example = self.examples[0]
        self.rewards = RewardFunctions(reward_fn, reward_weights, prompt_key, example)
        # Raise errors about prompts here, not in the first generation.
        prompts = (self.encoder(self.examples[i][prompt_key]) for i in range(min(len(self.examples), _LOOKED_AT)))
        self._longest_prompt = max(map(len, prompts))
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        self._tally = Tally(self.rewards.names)
        self._seen = self._tally.nothing()
        # Mark this object as a fitness function for populations.
        batched(self, check=check)

    def __call__(self, population: Population) -> Tensor:
        """Return the score of every member for every prompt of the generation, ``[N, K]``."""
        model, n = population.model, len(population)
        if self.kl_penalty > 0 and not self.divergence.has_reference(model):
            raise ValueError(
                "kl_penalty needs a model to compare with: pass reference=, such as copy.deepcopy(model) before"
                " training"
            )
        if self.divergence.reference is model:
            raise ValueError(
                "reference is the model that is trained, and moves with it: pass a copy, made before training"
            )
        drawn = self.examples.drawn(self.prompts_per_generation, population.seed, population.generation)
        prompts = [self.encoder(example[self.prompt_key]) for example in drawn]
        population.eval()
        found: list[list[Completion]] = [[] for _ in range(n)]
        divergences = []
        for first in range(0, len(prompts), self.prompts_per_call):
            tile = prompts[first : first + self.prompts_per_call]
            each = self.completer.by_members(population, tile, self.samples_per_prompt, key=("completions", first))
            for all_of_member, of_member in zip(found, each, strict=True):
                all_of_member += of_member
            if self.kl_penalty > 0:
                divergences.append(self.divergence.of_members(population, self._rows(tile), each))
        completions = [completion for of_member in found for completion in of_member]
        totals, each_function = self.rewards(self._rows(drawn) * n, completions)
        divergence = torch.cat(divergences, 1).flatten() if divergences else None
        self._seen = self._seen + self._tally.of(completions, totals, each_function, divergence)
        shape = n, len(prompts), self.samples_per_prompt
        scores = self._of_samples(totals.view(shape))
        if divergence is not None:
            scores = scores - self.kl_penalty * divergence.view(shape).mean(2)
        return scores

    def member_bytes(self, model: nn.Module) -> int:
        """Return the approximate bytes of one member's completions, from which a trainer sizes chunks."""
        rows = min(self.prompts_per_call, self.prompts_per_generation) * self.samples_per_prompt
        tokens = self._longest_prompt + self.completer.decoding.max_new_tokens
        # The logits of the last token exist twice: in the model's dtype and in float32.
        return rows * (tokens * cache_bytes(model) + 2 * logit_bytes(model))

    def evaluate(
        self,
        model: nn.Module,
        dataset: Any = None,
        n: int | None = None,
        *,
        samples_per_prompt: int | None = None,
        temperature: float | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> EvaluationResult:
        """Complete prompts with one model, and compute the rewards.

        Use prompts that are not trained on. The divergence is also computed if there is a reference model:
        ``reference``, or a PEFT model without its adapters.

        Args:
            model: The model, such as ``trainer.model`` or a PEFT model.
            dataset: Prompts with the same columns; the training prompts if None.
            n: Number of prompts to use, from the first one on; all if None.
            samples_per_prompt: ``S``; if None, as in training, or 1 for greedy completions.
            temperature: The temperature; as in training if None.
            batch_size: Largest number of completions generated together. Samples of one prompt stay together.
            seed: Seed of the random numbers; torch's own generators do not advance.

        Returns:
            Means over the prompts, and every completion with its rewards.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range.
        """
        decoding = self.completer.decoding
        if temperature is not None:
            decoding = decoding.at(temperature)
        if samples_per_prompt is None:
            samples = self.samples_per_prompt if decoding.samples else 1
        else:
            samples = check_samples(samples_per_prompt, decoding)
        each_call = max(1, check_int("batch_size", batch_size, 1) // samples)
        examples = (self.examples if dataset is None else Examples(dataset, [self.prompt_key])).first(n)
        completer = Completer(self.completer.tokenizer, decoding)
        prompts = [self.encoder(example[self.prompt_key]) for example in examples]
        completions: list[Completion] = []
        with evaluating(model), forked_rng("evaluation", seed, device=device_of(model)):
            for first in range(0, len(prompts), each_call):
                completions += completer.by_model(model, prompts[first : first + each_call], samples)
            divergence = None
            if self.divergence.has_reference(model):
                divergence = self.divergence.of_model(model, self._rows(prompts, samples), completions)
        return self._result(examples, completions, samples, divergence)

    def pop_statistics(self) -> Tensor:
        """Return sums over the completions of the last chunk, and reset them."""
        seen, self._seen = self._seen, self._tally.nothing()
        return seen

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        """Compute the metrics of a generation from the sums of its chunks.

        Args:
            model: The model that is trained.
            statistics: The result of :meth:`pop_statistics` for each chunk, in the order of members.
        """
        sums = torch.stack(list(statistics)).sum(0)
        self.metrics = self._tally.means(sums)
        self.tokens += int(sums[1])

    def state_dict(self) -> dict[str, int]:
        """Return the number of tokens."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.tokens = state["tokens"]

    def _of_samples(self, rewards: Tensor) -> Tensor:
        """Return the score of each prompt from the rewards of its samples, ``[..., S] → [...]``."""
        return rewards.mean(-1) if self.pass_at_k is None else expected_best(rewards, self.pass_at_k)

    def _rows(self, values: Sequence[T], samples: int | None = None) -> list[T]:
        """Return each value repeated for its samples."""
        return [value for value in values for _ in range(self.samples_per_prompt if samples is None else samples)]

    def _result(
        self, examples: Sequence[Example], completions: list[Completion], samples: int, divergence: Tensor | None
    ) -> EvaluationResult:
        totals, each = self.rewards(self._rows(examples, samples), completions)
        means = self._tally.means(self._tally.of(completions, totals, each, divergence))
        rewards = totals.view(len(examples), samples)
        texts = [completion.text for completion in completions]
        return EvaluationResult(
            reward=float(rewards.mean()),
            rewards=rewards,
            each={name: means.get(f"rewards/{name}", float("nan")) for name in self.rewards.names},
            pass_at_k={k: float(expected_best(rewards, k).mean()) for k in _powers_of_two(samples)},
            length=means["completion_length"],
            ended=means["ended"],
            kl=means.get("kl"),
            prompts=[example[self.prompt_key] for example in examples],
            completions=[texts[i : i + samples] for i in range(0, len(texts), samples)],
        )


def check_samples(samples: int, decoding: Decoding) -> int:
    """Return the number of completions of a prompt, if it fits the settings.

    Raises:
        TypeError: ``samples`` is not an integer.
        ValueError: It is less than 1, or it is more than 1 and completions are greedy.
    """
    samples = check_int("samples_per_prompt", samples, 1)
    if samples > 1 and not decoding.samples:
        raise ValueError(
            f"samples_per_prompt={samples} needs a temperature above 0: greedy completions are all the same"
        )
    return samples


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
