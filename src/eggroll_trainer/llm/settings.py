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
    """A weight for each reward function; by default, 1."""
    objective: Literal["reward", "likelihood", "perplexity"] = "reward"
    """What to maximise: the reward of completions, the log-probability of given answers, or that of texts."""
    preset: Preset | None = None
    """Published settings to use as defaults, of the EGGROLL paper or of es-at-scale."""
    eval_data: str | None = None
    """Data for evaluations, given like the training data; by default, a share of these."""
    eval_fraction: float = 0.1
    """Share of the prompts to hold out for evaluations; 0 evaluates on the training data."""
    prompt_key: str = "prompt"
    """Column of the prompt: a text, or a list of messages."""
    answer_key: str = "answer"
    """Column of the answer, for the objective likelihood."""
    text_key: str = "text"
    """Column of the text, for the objective perplexity."""
    chat: bool = False
    """Whether to turn a prompt that is a text into a user's message, formatted with the tokenizer's chat template."""
    system: str | None = None
    """A system message before the user's message, with --chat."""
    generations: int = 100
    """Number of generations, including those before a --resume."""
    population_size: int = 32
    """Members in a generation."""
    sigma: float = 0.002
    """Standard deviation of the perturbations. Larger models need smaller ones."""
    learning_rate: float = 0.4
    """Step size. With sgd, about the step of a weight in a generation, in units of sigma."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer that takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations."""
    shaping: str = "zscore"
    """How scores become weights: zscore, centered_ranks, antithetic_sign or raw."""
    compare: Literal["prompts", "mean"] = "prompts"
    """Whether to compare members prompt by prompt, or by their mean over the prompts."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """What to train: all-linear, all, ends of the paths of modules such as q_proj v_proj, or one regular
    expression."""
    exclude_modules: tuple[str, ...] = ()
    """Modules to leave out of these."""
    freeze_nonlora: bool = False
    """Whether to train only matrices; biases and norms stay as they are."""
    anchor_decay: float = 0.0
    """Pull towards the initial weights: each generation undoes the share learning-rate * anchor-decay of the change."""
    kl_penalty: float = 0.0
    """Factor of the divergence from the initial model, in nats per completion, which is subtracted from scores."""
    report_kl: bool = False
    """Whether evaluations report that divergence. This needs a copy of the initial model."""
    prompts_per_generation: int = 8
    """Prompts that all members of a generation complete (texts, for the objective perplexity)."""
    max_new_tokens: int = 64
    """Tokens after which a completion is cut off."""
    temperature: float = 0.0
    """Temperature of sampling; 0 for greedy completions."""
    samples_per_prompt: int = 1
    """Completions of each prompt by each member. More than one needs a temperature above 0."""
    pass_at_k: int | None = None
    """Number of samples whose expected best reward is the score of a prompt, instead of the mean reward."""
    max_length: int | None = None
    """Tokens after which a text is cut off, for the objective perplexity."""
    prompts_per_call: int | None = None
    """Prompts in one call of generate(); fewer take less memory. By default, all."""
    chunk_size: int | None = None
    """Members evaluated at a time; several processes share the chunks. By default, as many as memory allows."""
    eval_every: int = 10
    """Number of generations between evaluations of the centre. It is also evaluated at the beginning and the end."""
    eval_examples: int | None = None
    """Number of examples in an evaluation, from the first one on; by default, all."""
    eval_samples: int = 1
    """Completions of each prompt in an evaluation. More than one needs a temperature above 0, and reports pass@k."""
    eval_temperature: float = 0.0
    """Temperature of the completions in evaluations."""
    eval_batch_size: int = 32
    """Completions, or texts, that an evaluation computes together."""
    show: int = 4
    """Completions of the centre to show and store at each evaluation."""
    save_every: int = 10
    """Number of generations between checkpoints. One is also written at the end."""
    adapter_rank: int = 16
    """Rank of the PEFT adapter with the sum of all updates, which is written at the end; 0 for none."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Dtype of the weights, auto for that of the file; by default, float32 on a CPU and auto elsewhere."""
    device: str | None = None
    """Device to train on; by default, the first CUDA device if there is one, else the CPU."""
    engine: Literal["local", "torch", "ray"] | None = None
    """What evaluates the population; by default, torch under torchrun, else local."""
    seed: int = 0
    """Seed of noise, prompts and samples."""
    out: Path | None = None
    """Folder of the run; by default, runs/MODEL-SEED."""
    resume: bool = False
    """Continue the run in that folder."""
