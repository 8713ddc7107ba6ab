"""Checks the inputs of a run, its settings, data and reward functions, before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._utils.validation import check_int
from .data import as_conversations, check_columns, held_out, load_examples
from .examples import Example
from .reward_functions import RewardFunctions
from .settings import Settings


def check_settings(settings: Settings) -> None:
    """Check settings before anything is loaded.

    Raises:
        ValueError: A setting is out of range, missing, or belongs to another objective.
    """
    for name in ("generations", "show", "adapter_rank", "rank"):
        check_int(name, getattr(settings, name), 0)
    for name in ("eval_every", "eval_batch_size", "eval_samples", "save_every"):
        check_int(name, getattr(settings, name), 1)
    if settings.objective == "reward":
        if not settings.reward:
            raise ValueError(
                "--reward is missing: name a reward function with --reward MODULE:FUNCTION, or choose --objective"
                " likelihood or perplexity"
            )
    else:
        given = {
            "--reward": settings.reward,
            "--reward-weights": settings.reward_weights,
            "--kl-penalty": settings.kl_penalty,
            "--report-kl": settings.report_kl,
            "--pass-at-k": settings.pass_at_k,
        }
        for option, value in given.items():
            if value:
                raise ValueError(f"{option} is for --objective reward, not for {settings.objective}; leave it out")
    if settings.eval_samples > 1 and settings.eval_temperature == 0:
        raise ValueError(
            f"eval_samples={settings.eval_samples} needs an eval_temperature above 0: greedy completions are all the"
            " same"
        )
    if settings.system is not None and not settings.chat:
        raise ValueError("--system is a message of a conversation: add --chat")


def examples_of(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and those to evaluate on.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The data are malformed, or a column is missing.
    """
    if settings.objective == "perplexity":
        keys = {"--text-key": settings.text_key}
    else:
        keys = {"--prompt-key": settings.prompt_key}
        if settings.objective == "likelihood":
            keys["--answer-key"] = settings.answer_key
    key = next(iter(keys.values()))

    def loaded(option: str, source: str) -> list[Example]:
        examples = load_examples(option, source, key)
        check_columns(option, source, examples, keys)
        return as_conversations(examples, key, settings.system) if settings.chat else examples

    train = loaded("--data", settings.data)
    if settings.eval_data is not None:
        return train, loaded("--eval-data", settings.eval_data)
    return held_out(train, key, settings.eval_fraction, settings.seed)


def check_rewards(
    settings: Settings, functions: Sequence[Callable[..., Any]], train: Sequence[Example], held: Sequence[Example]
) -> None:
    """Check that the data have the columns that reward functions need.

    Raises:
        ValueError: A column is missing, or the number of weights is wrong.
    """
    if functions:
        for option, examples in (("--data", train), ("--eval-data", held)):
            try:
                RewardFunctions(list(functions), settings.reward_weights or None, settings.prompt_key, examples[0])
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from error
