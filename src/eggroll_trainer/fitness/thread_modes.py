"""The modes of torch that belong to a thread: gradients, inference mode, autocast.

A fitness function that is switched out inside ``with torch.inference_mode():`` must find the mode on when it goes on,
and no other function may see it meanwhile. Modes for which there is no such hand-over are reported by
:func:`foreign_context`; inside them a function is not switched out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# (inference mode, gradients on, autocast of the CPU, of the accelerator)
Modes = tuple[Any, ...]

_ACCELERATOR = "cuda" if not torch.backends.mps.is_available() else "mps"


def current() -> Modes:
    """Return the modes of the running thread."""
    return (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *autocast_state())


def autocast_state() -> Modes:
    """Return the autocast settings of the running thread."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled(_ACCELERATOR),
        torch.get_autocast_dtype(_ACCELERATOR),
    )


@contextlib.contextmanager
def autocast(state: Modes) -> Iterator[None]:
    """Run the block under the autocast settings that :func:`autocast_state` returned."""
    with contextlib.ExitStack() as stack:
        for device_type, enabled, dtype in (("cpu", *state[:2]), (_ACCELERATOR, *state[2:])):
            if enabled:
                stack.enter_context(torch.autocast(device_type, dtype))
        yield


class Suspended:
    """The modes of a function that is switched out, while others run under ``baseline``."""

    def __init__(self, own: Modes, baseline: Modes) -> None:
        self.own, self.baseline = own, baseline
        # A guard remembers the thread's whole state and restores it absolutely: guards of different functions may
        # end in any order.
        self._guard = torch._C._InferenceMode(baseline[0])
        self._guard.__enter__()
        apply(baseline)

    def resume(self) -> None:
        """Put the function's modes back."""
        _set_autocast(self.own)
        self._guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self.own[1])


def apply(modes: Modes) -> None:
    """Set gradients and autocast as ``modes`` says; inference mode is entered and left by its guards alone."""
    torch._C._set_grad_enabled(modes[1])
    _set_autocast(modes)


def _set_autocast(modes: Modes) -> None:
    for i, device_type in ((2, "cpu"), (4, _ACCELERATOR)):
        torch.set_autocast_enabled(device_type, modes[i])
        torch.set_autocast_dtype(device_type, modes[i + 1])


@contextlib.contextmanager
def kept() -> Iterator[Modes]:
    """Leave the thread's modes after the block as they were before it, also where code inside set and left them."""
    modes = current()
    try:
        yield modes
    finally:
        apply(modes)


def foreign_context() -> tuple[Any, ...]:
    """Return what else of the thread's state a function may have changed and cannot take along when it is switched.

    Function and dispatch modes (``torch.device`` as a context), functorch transforms, the default dtype and a
    running asyncio loop.
    """
    return (
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack() is not None,
        torch.get_default_dtype(),
        asyncio._get_running_loop() is not None,
    )
