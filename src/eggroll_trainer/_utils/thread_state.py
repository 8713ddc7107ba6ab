"""Restores torch's modes after an exception that was raised inside of torch's own context managers.

torch sets its modes in context managers written in Python. A signal handler may raise an exception between the setting
of a mode and the ``try`` that resets it. Then the mode stays on.
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

# Functions that get and set a setting.
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
    # It may contain casts from a block that has ended.
    torch.clear_autocast_cache()


def _set_function_modes(modes: list[Any]) -> None:
    # Through the methods of the base class, as a mode's own methods may have side effects.
    for mode in reversed(get_current_function_mode_stack()):
        TorchFunctionMode.__exit__(mode, None, None, None)
    for mode in modes:
        TorchFunctionMode.__enter__(mode)


def _set_transforms(depth: int) -> None:
    # Remove levels of vmap and the like that the block has left open.
    while get_dynamic_layer_stack_depth() > depth:
        pop_dynamic_layer_stack()


# Stacks of modes come first, as the other functions could be intercepted by modes.
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

# Guards of inference mode that must stay alive, as their mode ends with them.
_kept_guards: list[Any] = []


def _set_inference(enabled: bool, error: BaseException) -> None:
    """Restore inference mode after an exception.

    It can only be changed by guards. A guard that was not exited ends when it is freed, but the exception's traceback
    keeps it alive. So we clear the frames of the traceback now. Later, the guard would restore an outdated state.
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
    """If the block raises, restore torch's state of the thread and the process.

    This includes transforms and modes, gradients, inference mode, autocast, the compiler's stance, the default dtype,
    deterministic algorithms, the number of threads, and whether garbage collection is on. If the block ends normally,
    nothing is restored, as it may have changed these on purpose.
    """

    __slots__ = ("_inference", "_values")

    def __enter__(self) -> None:
        self._values = [get() for get, _ in _SETTINGS]
        self._inference = torch.is_inference_mode_enabled()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            return
        # First, as the end of an inference guard changes other settings too.
        if torch.is_inference_mode_enabled() != self._inference:
            _set_inference(self._inference, error)
        for (get, put), value in zip(_SETTINGS, self._values, strict=True):
            if get() != value:
                put(value)
