"""Fitness functions without generation: the likelihood of given answers or texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .._utils.validation import check_int
from .examples import Example, Examples
from .prompts import PromptEncoder, is_conversation
from .scoring import Scored, TeacherForced


class LogLikelihood(TeacherForced):
    """Fitness function: the log-probability of given answers, ``log p(answer | prompt)``, without generation.

    Each generation draws prompts from the data set, the same for all members. There is one score for each prompt,
    ``[N, K]``.

    Args:
        tokenizer: A tokenizer of transformers.
        dataset: A list of dicts, a ``datasets.Dataset`` or another sequence of mappings.
        prompts_per_generation: ``K``.
        prompt_key: The column of the prompt, a text or a list of messages.
        answer_key: The column of the answer, a text or, for a conversation, a list of messages.
        reduction: ``"mean"`` over the tokens of an answer, so that long answers count as much as short ones, or
            ``"sum"``, the log-probability of the whole answer.
        end: Whether the token that ends the answer is scored too, so that the model learns to stop.
        chat_template_kwargs: Keyword arguments of the chat template.
        logits_budget: Bytes for the logits of a forward. Prompts that don't fit are computed in further forwards. A
            forward has at least one prompt for all members of a chunk; a smaller ``chunk_size`` of the trainer reduces
            that.
        check: Whether to compare members, now and then, with the model with their weights.

    Raises:
        TypeError: ``dataset`` is not a sequence, or a prompt is neither a text nor a list of messages.
        ValueError: A column is missing, an answer is empty, or an argument is out of range.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "say": 1, "yes": 2, "no": 3}, unk_token="no"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> sizes = dict(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
        >>> fitness = LogLikelihood(tokenizer, [{"prompt": "say", "answer": "yes"}], prompts_per_generation=1)
        >>> trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=8, noise_reuse=2, seed=0)
        >>> trainer.train(2, verbose=False)["generation"]
        2
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        *,
        prompts_per_generation: int = 8,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        reduction: Literal["mean", "sum"] = "mean",
        end: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        logits_budget: int = 2**28,
        check: bool = True,
    ) -> None:
        self.prompt_key, self.answer_key, self.end = prompt_key, answer_key, bool(end)
        examples = Examples(dataset, [prompt_key, answer_key])
        count = examples.check_count("prompts_per_generation", prompts_per_generation)
        encoder = PromptEncoder(tokenizer, chat_template_kwargs)
        super().__init__(examples, encoder, count, reduction, logits_budget, check)

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.prompt_key, self.answer_key

    def _encoded(self, example: Example) -> Scored:
        prompt, answer = example[self.prompt_key], example[self.answer_key]
        tokens = self.encoder(prompt)
        added = self._of_text(prompt, answer, tokens) if isinstance(prompt, str) else self._of_turn(prompt, answer)
        if not added:
            raise ValueError(f"the answer to the prompt {prompt!r} has no tokens")
        return Scored([*tokens, *added], len(added))

    def _of_text(self, prompt: str, answer: Any, tokens: list[int]) -> list[int]:
        if not isinstance(answer, str):
            raise TypeError(f"the answer to a prompt that is a text must be a text, got {type(answer).__name__}")
        # Some tokenizers encode the beginning of a text differently from its continuation.
        whole = self.encoder.plain(prompt + answer, special=True)
        ends = self._ends()
        while whole and whole[-1] in ends:
            # Remove end tokens that the tokenizer has added.
            whole.pop()
        goes_on = whole[: len(tokens)] == tokens
        added = whole[len(tokens) :] if goes_on else self.encoder.plain(answer)
        return [*added, *self._ends()[:1]] if self.end else added

    def _of_turn(self, prompt: Any, answer: Any) -> list[int]:
        messages = list(prompt)
        begun = str(messages.pop()["content"]) if messages[-1]["role"] == "assistant" else ""
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": begun + answer}]
        elif not is_conversation(answer):
            raise TypeError(f"an answer must be a text or a list of messages, got {type(answer).__name__}")
        before = self.encoder.formatted(prompt)
        after = self.encoder.formatted([*messages, *answer], complete=True)
        if not after.startswith(before):
            raise ValueError(
                "the chat template formats the prompt differently when an answer follows it; pass prompts and answers"
                f" as texts. Prompt: {before!r}, with the answer: {after!r}"
            )
        added = self.encoder.plain(after[len(before) :])
        ends = self._ends()
        last = max((i for i, token in enumerate(added) if token in ends), default=None)
        if last is None:
            return added
        return added[: last + 1] if self.end else added[:last]

    def _ends(self) -> list[int]:
        token = getattr(self.encoder.tokenizer, "eos_token_id", None)
        return [] if token is None else [int(token)]


class Perplexity(TeacherForced):
    """Fitness function: the negative logarithm of the perplexity of texts, the mean log-probability of their tokens.

    Each generation draws texts from the data set, the same for all members. There is one score for each text,
    ``[N, K]``. :meth:`~TeacherForced.evaluate` reports the perplexity itself.

    Args:
        tokenizer: A tokenizer of transformers.
        dataset: A list of texts, or as for :class:`LogLikelihood`.
        texts_per_generation: ``K``.
        text_key: The column of the text.
        max_length: Tokens after which a text is cut off; None for whole texts.
        logits_budget: As for :class:`LogLikelihood`.
        check: As for :class:`LogLikelihood`.

    Raises:
        TypeError: ``dataset`` is not a sequence, or a text is not a string.
        ValueError: A column is missing, a text has less than two tokens, or an argument is out of range.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "say": 1, "yes": 2, "no": 3}, unk_token="no"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> sizes = dict(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
        >>> fitness = Perplexity(tokenizer, ["say yes", "say no"], texts_per_generation=2)
        >>> trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=8, noise_reuse=2, seed=0)
        >>> trainer.train(2, verbose=False)["generation"]
        2
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        *,
        texts_per_generation: int = 8,
        text_key: str = "text",
        max_length: int | None = None,
        logits_budget: int = 2**28,
        check: bool = True,
    ) -> None:
        self.text_key = text_key
        self.max_length = None if max_length is None else check_int("max_length", max_length, 2)
        examples = Examples(dataset, [text_key])
        count = examples.check_count("texts_per_generation", texts_per_generation)
        super().__init__(examples, PromptEncoder(tokenizer), count, "mean", logits_budget, check)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.text_key,)

    def _encoded(self, example: Example) -> Scored:
        text = example[self.text_key]
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, got {type(text).__name__}")
        tokens = self.encoder.plain(text, special=True)[: self.max_length]
        if len(tokens) < 2:
            raise ValueError(f"the text {text!r} has {len(tokens)} tokens; at least two are needed to predict one")
        return Scored(tokens, len(tokens) - 1)
