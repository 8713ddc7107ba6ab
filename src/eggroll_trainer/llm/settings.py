"""The settings of ``eggroll llm``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .presets import Preset


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a language model is trained."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder or hub name of a causal language model of transformers."""
    data: str
    """Training data: a .jsonl, .json or .csv file, or MODULE:FUNCTION (or FILE.py:FUNCTION) that returns a list of
    dicts."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """MODULE:FUNCTION (or FILE.py:FUNCTION) of a reward function, reward_fn(prompts, completions, **columns) ->
    list[float]; may be repeated, and the rewards are added up."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward function; 1 if left out."""
    objective: Literal["reward", "likelihood", "perplexity"] = "reward"
    """What is raised: the reward of completions, the log-probability of given answers, or that of texts."""
    preset: Preset | None = None
    """Published settings instead of these defaults: of the EGGROLL paper, or of es-at-scale."""
    eval_data: str | None = None
    """Data for evaluations, given as the training data are; a share of those if left out."""
    eval_fraction: float = 0.1
    """Share of the prompts that is held out for evaluations; 0 to evaluate on the training data."""
    prompt_key: str = "prompt"
    """Column of the prompt: a text, or a list of messages."""
    answer_key: str = "answer"
    """Column of the answer, for the objective likelihood."""
    text_key: str = "text"
    """Column of the text, for the objective perplexity."""
    chat: bool = False
    """Whether a prompt that is a text becomes a user's message, formatted by the tokenizer's chat template."""
    system: str | None = None
    """The system's message before that of the user, with --chat."""
    generations: int = 100
    """Generations to train for, those before a --resume included."""
    population_size: int = 32
    """Members in a generation."""
    sigma: float = 0.002
    """Standard deviation of the perturbations; larger models take smaller ones."""
    learning_rate: float = 0.4
    """Step size; with sgd, in units of sigma per generation and weight."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """What takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations."""
    shaping: str = "zscore"
    """How scores become weights: zscore, centered_ranks, antithetic_sign or raw."""
    compare: Literal["prompts", "mean"] = "prompts"
    """Whether members are compared prompt by prompt, or by their mean over the prompts."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """What is trained: all-linear, all, ends of the paths of modules such as q_proj v_proj, or one regular
    expression."""
    exclude_modules: tuple[str, ...] = ()
    """What of these is left out."""
    freeze_nonlora: bool = False
    """Whether only matrices are trained; biases and norms stay as they are."""
    anchor_decay: float = 0.0
    """Pull towards the initial weights: a generation takes back the share learning-rate * anchor-decay."""
    kl_penalty: float = 0.0
    """Weight of the divergence from the initial model, in nats a completion, that scores are lowered by."""
    report_kl: bool = False
    """Whether evaluations report that divergence; it takes a copy of the initial model."""
    prompts_per_generation: int = 8
    """Prompts that all members of a generation complete (texts, for the objective perplexity)."""
    max_new_tokens: int = 64
    """Tokens after which a completion is cut off."""
    temperature: float = 0.0
    """Temperature of sampling; 0 for greedy completions."""
    samples_per_prompt: int = 1
    """Completions of each prompt by each member; more than one needs a temperature above 0."""
    pass_at_k: int | None = None
    """Score a prompt by the expected best of so many samples instead of their mean."""
    max_length: int | None = None
    """Tokens after which a text is cut off, for the objective perplexity."""
    prompts_per_call: int | None = None
    """Prompts in one call of generate(); fewer take less memory. All if left out."""
    chunk_size: int | None = None
    """Members evaluated at a time, which is what several processes share; as many as memory allows if left out."""
    eval_every: int = 10
    """Evaluate the centre every so many generations, besides the first and the last."""
    eval_examples: int | None = None
    """Examples of an evaluation, the first ones; all if left out."""
    eval_samples: int = 1
    """Completions of each prompt in an evaluation; more than one needs a temperature above 0, and reports pass@k."""
    eval_temperature: float = 0.0
    """Temperature of the completions in evaluations."""
    eval_batch_size: int = 32
    """Completions, or texts, that an evaluation computes together."""
    show: int = 4
    """Completions of the centre that are shown and kept at each evaluation."""
    save_every: int = 10
    """Write a checkpoint every so many generations, and at the end."""
    adapter_rank: int = 16
    """Rank at which the sum of all updates is written as a PEFT adapter in the end; 0 for none."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Type of the weights, auto for that of the file; float32 on a CPU and auto elsewhere if left out."""
    device: str | None = None
    """Where to train; the first CUDA device, if there is one, or else the CPU if left out."""
    engine: Literal["local", "torch", "ray"] | None = None
    """Who evaluates the population; what torchrun has started, else this process, if left out."""
    seed: int = 0
    """Of noise, prompts and samples."""
    out: Path | None = None
    """Folder of the run; runs/MODEL-SEED if left out."""
    resume: bool = False
    """Go on with the run in that folder."""
