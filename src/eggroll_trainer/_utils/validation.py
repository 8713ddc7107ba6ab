"""Checks of arguments. Every message names the argument, its value, and what is expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_module(model: Any, params: Any = None) -> nn.Module:
    """Return ``model`` if it is a module, else raise ``TypeError``; the message tells if ``params`` got the model."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params got the model (a {type(params).__name__}): pass it as model=, and leave params out or pass"
            " model.parameters()"
        )
    advice = "; create an instance, and pass that" if isinstance(model, type) and issubclass(model, nn.Module) else ""
    raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{advice}")


def check_fitness_fn(fitness_fn: Any) -> Callable[..., Any]:
    """Return ``fitness_fn`` if it can be called, else raise ``TypeError``."""
    if not callable(fitness_fn):
        raise TypeError(f"fitness_fn must be callable, got {type(fitness_fn).__name__}")
    return fitness_fn


def check_optimizer(optimizer: Any) -> Callable[..., Any]:
    """Return ``optimizer`` if it can be called, or ``torch.optim.SGD`` if it is None, else raise ``TypeError``."""
    if optimizer is None:
        return torch.optim.SGD
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be a factory such as torch.optim.Adam or a functools.partial of it,"
            f" got a {type(optimizer).__name__}"
        )
    return optimizer


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_real(name: str, value: Any, *, positive: bool) -> float:
    """Return ``value`` if it is a finite number, above zero or (unless ``positive``) zero.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        # A tensor with several elements raises RuntimeError.
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, got {number}")
    return number


def check_anchor_decay(value: Any, learning_rate: float) -> float:
    """Return ``value`` if a step with it moves weights no further than back to the initial ones.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative, or more than ``1 / learning_rate``.
    """
    decay = check_real("anchor_decay", value, positive=False)
    if decay * learning_rate > 1:
        raise ValueError(f"anchor_decay must be at most 1 / learning_rate = {1 / learning_rate:g}, got {decay:g}")
    return decay


def check_evaluation_dtype(value: Any) -> torch.dtype | None:
    """Return ``value`` if it is ``torch.bfloat16``, ``torch.float16`` or None.

    Raises:
        TypeError: It is not a dtype.
        ValueError: It is another dtype.
    """
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"evaluation_dtype must be a torch.dtype or None, got {type(value).__name__} {value!r}")
    if value not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"evaluation_dtype must be torch.bfloat16 or torch.float16, got {value}")
    return value


def check_coalesce(value: Any) -> bool | Literal["unchecked"]:
    """Return ``value`` if it is True, False or ``"unchecked"``.

    Raises:
        TypeError: It is neither a bool nor a string.
        ValueError: It is another string.
    """
    if isinstance(value, str):
        if value != "unchecked":
            raise ValueError(f'coalesce must be True, False or "unchecked", got {value!r}')
        return "unchecked"
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'coalesce must be True, False or "unchecked", got {type(value).__name__} {value!r}')
    return bool(value)


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, else raise ``TypeError``."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise ``ValueError`` unless ``divisor`` divides ``value``; 0 and 1 divide everything."""
    if divisor > 1 and value % divisor:
        raise ValueError(
            f"{name} must be divisible by {divisor_name}={divisor}, got {value};"
            f" the next one is {value + divisor - value % divisor}"
        )


def check_device(device: Any) -> torch.device:
    """Return ``device`` as a ``torch.device``.

    Raises:
        ValueError: There is no such device type.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error


def parameter_groups(params: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Return groups ``{"params": [...], "names": [...], …}`` of the parameters to train.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or dictionaries with groups of these and their options; None
            for all parameters of the model. Frozen parameters are included, as they may be unfrozen later, except for
            those that cannot be perturbed.
        model: The model that they must belong to.

    Raises:
        TypeError: An entry is none of these.
        ValueError: No parameter can be trained, or one is not the model's, is given twice, or cannot be perturbed.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters (none with requires_grad=True)")
    entries = _entries(model.parameters() if params is None else params)
    grouped = [isinstance(entry, Mapping) for entry in entries]
    if any(grouped) and not all(grouped):
        raise TypeError("params mixes parameters and groups; give either parameters or dictionaries only")
    groups = [dict(entry) for entry in entries] if all(grouped) else [{"params": entries}]
    seen: set[int] = set()
    for group in groups:
        if "params" not in group:
            raise ValueError(f"a parameter group has no 'params', only {sorted(group)}")
        given = group["params"]
        empty = "a parameter group is empty: leave it out; if it was an iterator that has been used, pass a list"
        parameters = [_parameter(e) for e in ([given] if isinstance(given, nn.Parameter) else _entries(given, empty))]
        for p in parameters:
            _check_parameter(p, names, seen)
        group["params"] = [p for p in parameters if _obstacle(p) is None]
        group["names"] = [names[id(p)] for p in group["params"]]
    groups = [group for group in groups if group["params"]]
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    if not trained:
        raise ValueError("every parameter in params is frozen (requires_grad=False)")
    if not any(p.numel() for p in trained):
        raise ValueError("there is nothing to train: all parameters are empty")
    return groups


def _entries(
    params: Any, empty: str = "params is empty: pass model.parameters(), or leave it out to train them all"
) -> list[Any]:
    advice = "params must be an iterable of parameters such as model.parameters(), or a list of groups"
    if isinstance(params, (nn.Module, torch.Tensor)):
        raise TypeError(f"{advice}, got a {type(params).__name__}; a model is passed as model=")
    if isinstance(params, (Mapping, set, frozenset, str)) or not isinstance(params, Iterable):
        # The order of a set may differ between processes.
        raise TypeError(f"{advice}, got a {type(params).__name__}")
    entries = list(params)
    if not entries:
        raise ValueError(empty)
    return entries


def _parameter(entry: Any) -> nn.Parameter:
    value = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
    if not isinstance(value, nn.Parameter):
        raise TypeError(f"params must contain parameters of the model, got {type(value).__name__}")
    return value


def _check_parameter(p: nn.Parameter, names: dict[int, str], seen: set[int]) -> None:
    if id(p) not in names:
        raise ValueError("params contains a parameter that is not one of the model's")
    name = names[id(p)]
    if id(p) in seen:
        raise ValueError(f"parameter {name!r} is in params twice")
    seen.add(id(p))
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ValueError(f"parameter {name!r} has no shape yet: run the model once before training it")
    obstacle = _obstacle(p)
    if p.requires_grad and obstacle is not None:
        raise ValueError(f"parameter {name!r} {obstacle}")


def _obstacle(p: nn.Parameter) -> str | None:
    """Return why a parameter cannot be trained, or None if it can."""
    if p.dtype not in _DTYPES or p.layout is not torch.strided:
        return f"of {p.dtype}, {p.layout} cannot be perturbed; freeze it"
    if p.is_meta:
        return "is on the meta device and has no values; materialise the model first"
    if p.is_inference():
        return "was made under torch.inference_mode(); make the model outside it"
    return None


def check_options(group: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ``ValueError`` for an option of a parameter group that the trainer does not have."""
    unknown = group.keys() - {"params", "names", *known}
    if unknown:
        raise ValueError(f"parameter group has unknown options {sorted(unknown)}; known are {sorted(known)}")


def check_flat(method: str, value: Any, shape: tuple[int, ...]) -> None:
    """Check the result of a user-defined method: a finite real tensor of this shape.

    Raises:
        TypeError: It is not a tensor.
        ValueError: It has another shape, is complex, or is not finite.
    """
    expected = f"{method} must return a tensor of shape {list(shape)}"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{expected}, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{expected}, got shape {list(value.shape)}")
    if value.is_complex() or not value.isfinite().all():
        raise ValueError(f"{method} returned values that are not finite real numbers; the parameters were not changed")
