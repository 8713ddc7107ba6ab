"""Error messages for unknown arguments, which suggest the right one."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_PAIRS = "noise_reuse=2, which makes antithetic pairs"
_STEP = "optimizer, such as functools.partial(torch.optim.Adam, {0}=…)"
_TRAIN = "train({0}=…), which is given when training begins"
_GENERATIONS = "train(num_generations=…), which is given when training begins"
_LOSS = "fitness_fn, with maximize=False where lower is better"
_SHARING = "engine, or chunk_size: how many members are evaluated at a time"

# Names of a trainer's arguments in other libraries and papers. {0} stands for the given name.
_OF_TRAINERS: dict[str, tuple[str, ...]] = {
    "learning_rate": (
        *("lr", "alpha", "eta", "lrate", "step_size", "stepsize", "learning_rate_init", "lr_init"),
        *("center_learning_rate", "mean_learning_rate", "initial_lr"),
    ),
    "population_size": (
        *("popsize", "pop_size", "pop", "npop", "n_pop", "population", "num_members", "members", "num_population"),
        *("populationsize", "num_directions", "n_directions", "lam", "lambda_"),
    ),
    "sigma": (
        *("std", "stdev", "stdev_init", "sigma_init", "init_sigma", "sigma0", "noise_std", "noise_stdev"),
        *("noise_scale", "init_stdev", "perturbation_scale", "epsilon", "eps_std"),
    ),
    "fitness_fn": (
        *("fitness", "fitness_function", "fitness_func", "objective", "objective_fn", "objective_func", "eval_fn"),
        *("reward_fn", "score_fn", "evaluate", "func", "fn", "closure", "fit_fn"),
    ),
    "model": ("net", "network", "policy", "module", "nn_module", "architecture"),
    "params": ("parameters", "param_groups", "model_params", "solution"),
    "seed": ("random_seed", "random_state", "rng", "key", "manual_seed"),
    "rank": ("lora_rank", "r", "low_rank"),
    "optimizer": ("optim", "opt", "optimizer_fn", "optimizer_class", "optimizer_cls", "center_optimizer"),
    "lr_scheduler": ("scheduler", "schedule", "lr_schedule", "learning_rate_schedule"),
    "maximize": ("minimize", "objective_sense", "direction", "maximise", "minimise"),
    "chunk_size": ("batch_size", "minibatch_size", "eval_batch_size", "micro_batch_size"),
    "max_grad_norm": (
        *("grad_clip", "clip_grad", "clip_grad_norm", "clip_norm", "max_norm", "gradient_clipping", "grad_clip_norm"),
        *("gradient_clip_val", "clipnorm", "clip"),
    ),
    "evaluation_dtype": ("dtype", "precision", "autocast_dtype", "amp_dtype"),
    "freeze_nonlora": ("freeze_non_lora", "lora_only"),
    'shaping, such as shaping="centered_ranks"': (
        *("fitness_shaping", "rank_fitness", "ranking_method", "rank_transform", "shaping_fn", "centered_rank"),
        "fitness_shaper",
    ),
    _PAIRS: (
        *("antithetic", "antithetic_sampling", "use_antithetic_sampling", "symmetric", "mirrored"),
        "mirrored_sampling",
    ),
    _LOSS: ("loss", "loss_fn", "loss_function", "criterion", "cost_fn", "cost"),
    _STEP: ("weight_decay", "momentum", "betas", "beta1", "beta2", "eps", "l2_coeff", "optimizer_config"),
    _GENERATIONS: (
        *("epochs", "n_epochs", "num_epochs", "generations", "num_generations", "n_generations", "iterations"),
        *("num_iterations", "n_iter", "max_iter", "maxiter", "max_generations", "num_steps", "steps"),
    ),
    _TRAIN: ("verbose", "log_every", "callback", "callbacks", "checkpoints"),
    _SHARING: ("num_workers", "n_jobs", "workers", "num_actors", "n_workers", "num_processes"),
}
_OF_TRAIN: dict[str, tuple[str, ...]] = {
    "num_generations": (
        *("epochs", "n_epochs", "num_epochs", "generations", "n_generations", "iterations", "num_iterations"),
        *("n_iter", "max_iter", "maxiter", "max_generations", "num_steps", "steps", "total_timesteps"),
    ),
    "callback": ("on_generation", "hooks", "hook", "loggers", "logger"),
    "verbose": ("progress", "progress_bar", "show_progress", "disp", "quiet"),
    "log_every": ("log_interval", "log_freq", "every", "print_every", "verbose_every"),
    "checkpoints": ("checkpoint", "checkpoint_dir", "save_dir", "checkpointing"),
}


def _by_alias(names: Mapping[str, Collection[str]]) -> dict[str, str]:
    return {alias: meant.format(alias) for meant, aliases in names.items() for alias in aliases}


TRAINER_ALIASES, TRAIN_ALIASES = _by_alias(_OF_TRAINERS), _by_alias(_OF_TRAIN)


def explain_unknown(aliases: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a method suggest the right argument when it gets an unknown one.

    Args:
        aliases: Common names of arguments in other libraries, each with our argument or what to do instead.

    Example:
        >>> class Trainer:
        ...     @explain_unknown({"lr": "learning_rate"})
        ...     def __init__(self, *, learning_rate=0.1): ...
        >>> Trainer(lr=0.2)
        Traceback (most recent call last):
            ...
        TypeError: Trainer() has no argument 'lr'; did you mean learning_rate?
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(method).parameters if name != "self"]

        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs.keys() - set(known):
                # The user's class, which may inherit the method.
                cls = type(args[0]).__name__
                called = cls if method.__name__ == "__init__" else f"{cls}.{method.__name__}"
                raise TypeError(f"{called}() has no argument {name!r}; {_meant(name, known, aliases)}")
            return method(*args, **kwargs)

        return checked

    return decorate


def _meant(name: str, known: Collection[str], aliases: Mapping[str, str]) -> str:
    meant = aliases.get(name.lower())
    if meant is not None:
        argument = re.split(r"\W", meant)[0]
        # Not every class has every argument.
        if argument in known or argument == "train":
            return f"did you mean {meant}?"
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"it has {', '.join(known)}"
