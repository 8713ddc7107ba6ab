"""Modes of torch are restored after an exception has interrupted one of its context managers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # the settings of the compiler are compared, which setting a stance would import
from surroundings import surroundings
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eggroll_trainer._utils.thread_state import restored_thread_state


class Function(BaseTorchFunctionMode):
    pass


class Dispatch(TorchDispatchMode):
    pass


def half_dispatch() -> None:
    torch._C._push_on_torch_dispatch_stack(Dispatch())


def deterministic() -> None:
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)


def replaced_function_modes() -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    Function().__enter__()


LEFT: dict[str, Callable[[], Any]] = {
    "vmap": lambda: [torch._C._functorch._vmap_increment_nesting(n, "error") for n in (2, 3)],
    "grad transform": torch._C._functorch._grad_increment_nesting,
    "function mode": lambda: [Function().__enter__(), torch.device("cpu").__enter__()],
    "function modes that are gone": replaced_function_modes,
    "dispatch mode": lambda: Dispatch().__enter__(),
    "half a dispatch mode": half_dispatch,
    "gradients": lambda: torch._C._set_grad_enabled(not torch.is_grad_enabled()),
    "inference": lambda: torch.inference_mode(not torch.is_inference_mode_enabled()).__enter__(),
    "autocast": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False).__enter__(),
    "autocast's depth": torch.autocast_increment_nesting,
    "dtype": lambda: torch.set_default_dtype(torch.float16),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "stance": lambda: torch.compiler.set_stance("force_eager"),
    "deterministic": deterministic,
    "garbage": gc.disable,
    "subclasses": lambda: torch._C._set_torch_function_state(torch._C._TorchFunctionState.ALL_DISABLED),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside other modes"])
@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_on_is_put_back(what: str, inside: bool) -> None:
    kept: list[Any] = []

    def leave() -> None:
        guard = LEFT[what]()
        kept.append(None if what == "inference" else guard)
        raise KeyboardInterrupt

    def run() -> None:
        # What is not imported has nothing set.
        assert torch.compiler.is_compiling() is False
        before = everything()
        with pytest.raises(KeyboardInterrupt), restored_thread_state():
            leave()
        assert everything() == before
        assert torch.equal(torch.vmap(torch.sin)(torch.ones(2)), torch.ones(2).sin())

    def everything() -> dict[str, Any]:
        enabled = torch._C._get_torch_function_state()  # type: ignore[attr-defined]
        modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        return {**surroundings(), "enabled": enabled, "modes": modes, "flag": flags()}

    if inside:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("cpu"), torch.inference_mode():
            run()
    else:
        run()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def flags() -> list[Any]:
    module = sys.modules["torch.utils._python_dispatch"]
    return [value for name, value in vars(module).items() if name.startswith("_is_in_")]


def test_what_a_block_sets_to_stay_stays() -> None:
    before = torch.is_grad_enabled()
    with restored_thread_state():
        torch._C._set_grad_enabled(not before)
    assert torch.is_grad_enabled() is not before
    torch._C._set_grad_enabled(before)
