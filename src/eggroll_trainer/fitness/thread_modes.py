"""What belongs to a thread or a process, and would have to belong to one member's fitness function.

A function that is switched out inside ``with torch.inference_mode():`` must find the mode on when it goes on, and no
other function may see it meanwhile. Modes for which there is no such hand-over are reported by
:func:`foreign_context`; inside them a function is not switched out.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .._torch import (
    disable_current_modes,
    len_torch_dispatch_stack,
    len_torch_function_stack,
    peek_interpreter_stack,
    temporarily_clear_interpreter_stack,
)

# (inference mode, gradients on, autocast of the CPU, its dtype, autocast of the accelerator, its dtype)
Modes = tuple[Any, ...]

_ACCELERATOR = "cuda" if not torch.backends.mps.is_available() else "mps"


def current() -> Modes:
    """Return the modes of the running thread."""
    return (
        _inference(),
        _gradients(),
        _autocast("cpu"),
        _autocast_dtype("cpu"),
        _autocast(_ACCELERATOR),
        _autocast_dtype(_ACCELERATOR),
    )


def apply(modes: Modes) -> None:
    """Set gradients and autocast as ``modes`` says; inference mode is entered and left by its guards alone."""
    torch.set_grad_enabled(modes[1])
    _set_autocast(modes)


def _set_autocast(modes: Modes) -> None:
    for i, device_type in ((2, "cpu"), (4, _ACCELERATOR)):
        torch.set_autocast_enabled(device_type, modes[i])
        torch.set_autocast_dtype(device_type, modes[i + 1])


@contextlib.contextmanager
def autocast(modes: Modes) -> Iterator[None]:
    """Run the block under the autocast settings among ``modes``."""
    with contextlib.ExitStack() as stack:
        for i, device_type in ((2, "cpu"), (4, _ACCELERATOR)):
            if modes[i]:
                stack.enter_context(torch.autocast(device_type, modes[i + 1]))
        yield


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Run the block under autocast to ``dtype``, or as it is if that is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def kept() -> Iterator[Modes]:
    """Leave the thread's modes after the block as they were before it, also where code inside set and left them."""
    modes = current()
    try:
        yield modes
    finally:
        apply(modes)


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Run the block on ordinary tensors, without gradients and in full precision, whatever the modes around it."""
    with contextlib.ExitStack() as stack:
        if peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        if len_torch_dispatch_stack():
            stack.enter_context(disable_current_modes())
        modes = stack.enter_context(kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        _set_autocast((*modes[:2], False, modes[3], False, modes[5]))
        yield


# What belongs to the process: (sys.stdout, sys.stderr, the filters of warnings and how they are shown).
Surroundings = tuple[Any, ...]


def surroundings() -> Surroundings:
    """Return what ``contextlib.redirect_stdout``, ``warnings.catch_warnings`` and the like replace."""
    return (sys.stdout, sys.stderr, warnings.filters, warnings.showwarning, warnings._showwarnmsg_impl)  # type: ignore[attr-defined]


def surround(values: Surroundings) -> None:
    """Put back what :func:`surroundings` returned."""
    sys.stdout, sys.stderr, warnings.filters, warnings.showwarning, shown = values
    warnings._showwarnmsg_impl = shown  # type: ignore[attr-defined]
    # Cached decisions of what to show hold for other filters.
    getattr(warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", lambda: None))()


class Stage:
    """The modes and surroundings under which the members take turns."""

    def __init__(self) -> None:
        self.modes, self.surroundings = current(), surroundings()
        self.autocast_depth = _autocast_depth()

    def clear(self, modes: Modes) -> Suspended | None:
        """Put the stage back in order after a function has run on it, and return what it needs to go on.

        Args:
            modes: The modes that it has left on.
        """
        around = surroundings()
        # The filters of warnings are a list, which may be equal to another one.
        same = around == self.surroundings and around[2] is self.surroundings[2]
        if same and modes == self.modes:
            return None
        return Suspended(self, modes, None if same else around)


def _autocast_depth() -> int:
    """Return how many autocast blocks are open."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


class Suspended:
    """The modes and surroundings of a function that is switched out."""

    def __init__(self, stage: Stage, modes: Modes, around: Surroundings | None) -> None:
        self._modes, self._around = modes, around
        self._guard = None
        if modes[0] != stage.modes[0]:
            # A guard remembers the thread's whole state and restores it absolutely: guards of different functions
            # may end in any order.
            self._guard = torch.inference_mode(stage.modes[0])
            self._guard.__enter__()
        self._depth, self._casts = 0, modes[2:] != stage.modes[2:]
        if self._casts:
            _set_autocast(stage.modes)
            # The casts that autocast keeps are dropped when the last block ends: blocks of others must not count.
            self._depth = _autocast_depth() - stage.autocast_depth
            for _ in range(self._depth):
                torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
        torch.set_grad_enabled(stage.modes[1])
        if around is not None:
            surround(stage.surroundings)

    def resume(self) -> None:
        """Put them in force again."""
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
        if self._casts:
            for _ in range(self._depth):
                torch.autocast_increment_nesting()
            _set_autocast(self._modes)
        torch.set_grad_enabled(self._modes[1])
        if self._around is not None:
            surround(self._around)


def foreign_context() -> tuple[Any, ...]:
    """Return what else of the thread's state a function may have changed and cannot take along when it is switched.

    Function and dispatch modes (``torch.device`` as a context), functorch transforms, the default dtype, and a running
    asyncio loop.
    """
    return (
        len_torch_function_stack(),
        len_torch_dispatch_stack(),
        peek_interpreter_stack(),
        torch.get_default_dtype(),
        _running_loop(),
    )


def in_transform() -> bool:
    """Return whether a transform of torch.func is under way, whose tensors have no values of their own."""
    return peek_interpreter_stack() is not None


# Asked at every call of every member: without the way through their modules, in half the time.
_running_loop = asyncio._get_running_loop
_inference, _gradients = torch.is_inference_mode_enabled, torch.is_grad_enabled
_autocast, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
