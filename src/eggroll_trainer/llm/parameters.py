"""Chooses the trained parameters of a language model by patterns, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .quantised import is_quantised

Patterns = str | Sequence[str]

ALL_LINEAR = "all-linear"


def trainable_parameters(
    model: nn.Module, target_modules: Patterns = ALL_LINEAR, *, exclude_modules: Patterns | None = None
) -> list[nn.Parameter]:
    """Return the parameters of a model that match patterns. Pass them to a trainer as ``params``.

    All other parameters stay frozen: members share them, and they are never copied.

    Args:
        model: The model.
        target_modules: ``"all-linear"`` for all linear layers except the output layer. Another string is a regular
            expression that must match the whole path of a module. In a list, each entry is a path or the end of one,
            such as ``["q_proj", "v_proj"]``. A module stands for all parameters below it: ``["self_attn"]`` for those
            of attention. Paths of parameters work too, such as ``["lm_head.weight"]``.
        exclude_modules: Modules to leave out of these, given in the same way.

    Returns:
        The parameters in the model's order, each once, even if it is tied.

    Raises:
        TypeError: A pattern is not a string.
        ValueError: A pattern matches nothing or quantised weights, or no parameter is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> [list(p.shape) for p in trainable_parameters(model, ["0", "1.weight"])]
        [[8, 4], [8], [8]]
        >>> [list(p.shape) for p in trainable_parameters(model, "[012]", exclude_modules=["1"])]
        [[8, 4], [8], [2, 8], [2]]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = _matching(model, "target_modules", target_modules)
    if exclude_modules is not None:
        chosen -= _matching(model, "exclude_modules", exclude_modules)
    quantised = next((name for name, p in model.named_parameters() if id(p) in chosen and is_quantised(p)), None)
    if quantised is not None:
        raise ValueError(
            f"{quantised!r} is quantised and cannot be perturbed: train an adapter on top of it, as made by"
            " peft.get_peft_model(model, …); a trainer then uses the adapter's parameters by default"
        )
    parameters = [p for p in model.parameters() if id(p) in chosen and p.is_floating_point()]
    if not parameters:
        raise ValueError(
            f"target_modules={target_modules!r} and exclude_modules={exclude_modules!r} leave nothing to train: no"
            " floating-point parameter is left; choose other modules"
        )
    return parameters


def _matching(model: nn.Module, argument: str, patterns: Patterns) -> set[int]:
    """Return the ids of the parameters that match patterns, or are below modules that do."""
    if isinstance(patterns, str):
        if patterns == ALL_LINEAR:
            return _all_linear(model)
        patterns, matches = [patterns], _matches_expression
    else:
        patterns, matches = list(patterns), _matches_end
    below = {path: [id(p) for p in module.parameters()] for path, module in model.named_modules(remove_duplicate=False)}
    below |= {name: [id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    found: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be strings, got {type(pattern).__name__} {pattern!r}")
        paths = [path for path in below if path and matches(pattern, path)]
        if not paths:
            raise ValueError(
                f"{argument}: {pattern!r} matches no module of {type(model).__name__}; there are"
                f" {', '.join(_last_names(model))}"
            )
        found.update(key for path in paths for key in below[path])
    return found


def _all_linear(model: nn.Module) -> set[int]:
    # PEFT leaves the output layer out too. It is often tied to the embedding.
    find: Any = getattr(model, "get_output_embeddings", None)
    output = None if find is None else find()
    linear = [module for module in model.modules() if _is_linear(module) and module is not output]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layers; name modules in target_modules")
    return {id(p) for module in linear for p in module.parameters(recurse=False)}


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D, as in GPT-2, is a linear layer with its weight transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matches_expression(pattern: str, path: str) -> bool:
    return re.fullmatch(pattern, path) is not None


def _matches_end(pattern: str, path: str) -> bool:
    return path == pattern or path.endswith(f".{pattern}")


def _last_names(model: nn.Module) -> list[str]:
    names = (path.rpartition(".")[2] for path, _ in model.named_modules() if path)
    return list(dict.fromkeys(name for name in names if not name.isdigit()))
