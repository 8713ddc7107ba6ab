"""What an exception leaves behind in a thread where it breaks into torch's own context managers.

Torch sets its modes by context managers written in Python. An exception between the setting and the ``try`` that takes
it back, as a signal raises it, leaves the mode on for good.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._torch import (
    compiler_state,
    dispatch_state,
    get_current_function_mode_stack,
    get_dynamic_layer_stack_depth,
    get_torch_function_state,
    is_fwd_grad_enabled,
    pop_dynamic_layer_stack,
    set_compiler_state,
    set_dispatch_state,
    set_fwd_grad_enabled,
    set_torch_function_state,
)

_ACCELERATOR = "cuda" if not torch.backends.mps.is_available() else "mps"

# How to ask for a setting and how to set it.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _autocast_of(device_type: str) -> list[_Setting]:
    return [
        (lambda: torch.is_autocast_enabled(device_type), lambda value: torch.set_autocast_enabled(device_type, value)),
        (lambda: torch.get_autocast_dtype(device_type), lambda value: torch.set_autocast_dtype(device_type, value)),
    ]


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _set_autocast_depth(depth: int) -> None:
    for _ in range(_autocast_depth(), depth):
        torch.autocast_increment_nesting()
    for _ in range(depth, _autocast_depth()):
        torch.autocast_decrement_nesting()
    # What was cast under the modes of a block that is over.
    torch.clear_autocast_cache()


def _set_function_modes(modes: list[Any]) -> None:
    # By the base's methods: those of a mode's own class may do more.
    for mode in reversed(get_current_function_mode_stack()):
        TorchFunctionMode.__exit__(mode, None, None, None)
    for mode in modes:
        TorchFunctionMode.__enter__(mode)


def _set_transforms(depth: int) -> None:
    # Levels of vmap and the like; a block that has opened one would find another as its own.
    while get_dynamic_layer_stack_depth() > depth:
        pop_dynamic_layer_stack()


# The stacks come first: the others would be asked through them.
_SETTINGS: list[_Setting] = [
    (get_dynamic_layer_stack_depth, _set_transforms),
    (dispatch_state, set_dispatch_state),
    (get_current_function_mode_stack, _set_function_modes),
    (get_torch_function_state, set_torch_function_state),
    (compiler_state, set_compiler_state),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (is_fwd_grad_enabled, set_fwd_grad_enabled),
    *_autocast_of("cpu"),
    *_autocast_of(_ACCELERATOR),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (_autocast_depth, _set_autocast_depth),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (_deterministic, _set_deterministic),
    (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
]

# Guards of inference mode that nobody leaves: a mode that is over when its guard is.
_kept_guards: list[Any] = []


def _set_inference(enabled: bool, error: BaseException) -> None:
    """End the inference mode of a block that is over, or enter one that was left.

    There is no way to set it. A guard that was not left ends with its object, which the exception keeps alive; later,
    it would set the thread back to what is the past by then.
    """
    chain: list[BaseException | None] = [error]
    while chain and torch.is_inference_mode_enabled() != enabled:
        one = chain.pop()
        if one is not None:
            traceback.clear_frames(one.__traceback__)
            chain += [one.__cause__, None if one.__context__ is one.__cause__ else one.__context__]
    if torch.is_inference_mode_enabled() != enabled:
        guard = torch.inference_mode(enabled)
        guard.__enter__()
        _kept_guards.append(guard)


class restored_thread_state:
    """Put back, where the block ends by an exception, what torch keeps for the thread or the process.

    These are the transforms and modes of torch, gradients, inference mode, autocast, the compiler's stance, the default
    dtype, deterministic algorithms, the number of threads, and whether garbage is collected. A block that ends by
    itself may have set them to stay.
    """

    __slots__ = ("_inference", "_values")

    def __enter__(self) -> None:
        self._values = [get() for get, _ in _SETTINGS]
        self._inference = torch.is_inference_mode_enabled()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            return
        # It sets other things as well as it ends.
        if torch.is_inference_mode_enabled() != self._inference:
            _set_inference(self._inference, error)
        for (get, put), value in zip(_SETTINGS, self._values, strict=True):
            if get() != value:
                put(value)
