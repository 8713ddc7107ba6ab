"""Modes of the thread and globals of the process, which are switched with the members' fitness functions.

A function that is suspended inside ``with torch.inference_mode():`` must find the mode on when it resumes, and other
functions must not see it. Modes that cannot be switched are reported by :func:`foreign_context`. Inside them, a
function is not suspended.
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
    """Set the gradient and autocast modes. Inference mode can only be changed by its own guards."""
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
    """Run the block under autocast to ``dtype``, or unchanged if that is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def kept() -> Iterator[Modes]:
    """Restore the thread's modes after the block, even if code in it has set modes without resetting them."""
    modes = current()
    try:
        yield modes
    finally:
        apply(modes)


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Run the block with ordinary tensors, no gradients and full precision, whatever the modes of the caller."""
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


# (sys.stdout, sys.stderr, warning filters, functions that show warnings)
ProcessGlobals = tuple[Any, ...]


def process_globals() -> ProcessGlobals:
    """Return the globals that ``contextlib.redirect_stdout``, ``warnings.catch_warnings`` and the like replace."""
    return (sys.stdout, sys.stderr, warnings.filters, warnings.showwarning, warnings._showwarnmsg_impl)  # type: ignore[attr-defined]


def set_process_globals(values: ProcessGlobals) -> None:
    """Set what :func:`process_globals` returned."""
    sys.stdout, sys.stderr, warnings.filters, warnings.showwarning, shown = values
    warnings._showwarnmsg_impl = shown  # type: ignore[attr-defined]
    # Python caches which warnings to show; the cache is for the previous filters.
    getattr(warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", lambda: None))()


class HubContext:
    """The modes and globals of the hub: the code that switches between members."""

    def __init__(self) -> None:
        self.modes, self.process_globals = current(), process_globals()
        self.autocast_depth = _autocast_depth()

    def restore(self, modes: Modes) -> Suspended | None:
        """Restore the hub's modes and globals after a function was suspended; return the function's if they differ.

        Args:
            modes: The modes of the suspended function.
        """
        globals_now = process_globals()
        # Warning filters are a list: compare its identity, not its contents.
        same = globals_now == self.process_globals and globals_now[2] is self.process_globals[2]
        if same and modes == self.modes:
            return None
        return Suspended(self, modes, None if same else globals_now)


def _autocast_depth() -> int:
    """Return the number of open autocast blocks."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


class Suspended:
    """The modes and globals of a suspended function."""

    def __init__(self, hub: HubContext, modes: Modes, globals_now: ProcessGlobals | None) -> None:
        self._modes, self._globals = modes, globals_now
        self._guard = None
        if modes[0] != hub.modes[0]:
            # A guard saves and restores the whole state of the thread, so guards of different functions may end in any
            # order.
            self._guard = torch.inference_mode(hub.modes[0])
            self._guard.__enter__()
        self._depth, self._casts = 0, modes[2:] != hub.modes[2:]
        if self._casts:
            _set_autocast(hub.modes)
            # Autocast clears its cache of casts when the last open block ends. Don't count blocks of other functions.
            self._depth = _autocast_depth() - hub.autocast_depth
            for _ in range(self._depth):
                torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
        torch.set_grad_enabled(hub.modes[1])
        if globals_now is not None:
            set_process_globals(hub.process_globals)

    def resume(self) -> None:
        """Set them again."""
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
        if self._casts:
            for _ in range(self._depth):
                torch.autocast_increment_nesting()
            _set_autocast(self._modes)
        torch.set_grad_enabled(self._modes[1])
        if self._globals is not None:
            set_process_globals(self._globals)


def foreign_context() -> tuple[Any, ...]:
    """Return the thread's modes that cannot be switched with a function.

    These are function and dispatch modes (such as ``torch.device`` as a context), functorch transforms, the default
    dtype, and a running asyncio loop.
    """
    return (
        len_torch_function_stack(),
        len_torch_dispatch_stack(),
        peek_interpreter_stack(),
        torch.get_default_dtype(),
        _running_loop(),
    )


def in_transform() -> bool:
    """Return whether a transform of torch.func is active, whose tensors have no values."""
    return peek_interpreter_stack() is not None


# Called at every call of every member. Bound here, without attribute lookups, they take half the time.
_running_loop = asyncio._get_running_loop
_inference, _gradients = torch.is_inference_mode_enabled, torch.is_grad_enabled
_autocast, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
