"""All private names of torch that the library uses. Other modules import them from here.

Each has torch's name without the leading underscore. None has a public equivalent in every release from 2.6 on. If a
release lacks one, importing this package raises an error that names it, unless noted otherwise.
``tests/test_torch_names.py`` tests the behaviour that we rely on.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.pyfunctorch as _pyfunctorch
import torch.nn.modules.batchnorm as _batchnorm
import torch.nn.modules.module as _module
import torch.overrides as _overrides
import torch.utils._python_dispatch as _python_dispatch
import torch.utils._pytree as _pytree
from torch import nn

# --- Nested containers of tensors: the arguments and results of models.
TreeSpec = _pytree.TreeSpec  # The structure without the leaves. We compare specs, and use their text as a key.
tree_flatten = _pytree.tree_flatten  # Leaves and structure, including types that users have registered.
tree_unflatten = _pytree.tree_unflatten  # The inverse.
tree_leaves = _pytree.tree_leaves  # Only the leaves.
tree_map = _pytree.tree_map  # Applies a function to each leaf.

# --- Functions that torch.nn calls and for which we have rules: keys to recognise the calls. If a release of torch.nn
# calls something else, the rule is not used: torch.vmap is slower, or members run one by one.
weight_norm: Any = torch._weight_norm  # By nn.utils.parametrizations.weight_norm.
pack_padded_sequence: Any = torch._pack_padded_sequence  # By the nn.utils.rnn function.
pad_packed_sequence: Any = torch._pad_packed_sequence  # By the nn.utils.rnn function.
nested_tensor_from_mask_left_aligned: Any = torch._nested_tensor_from_mask_left_aligned  # By nn.TransformerEncoder.
has_compatible_shallow_copy_type: Any = torch._has_compatible_shallow_copy_type  # By Module.to; it looks at no values.

# --- Modules.
NormBase = _batchnorm._NormBase  # The base of all layers with running statistics, also of users' own.
global_forward_hooks = _module._global_forward_hooks  # Hooks of all modules. If there are any, we don't batch members.
global_forward_pre_hooks = _module._global_forward_pre_hooks  # The same before the forward.

# --- Tensor subclasses. Documented under "Extending PyTorch", but in a private module.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass  # Operations on one without __torch_function__.
TorchDispatchMode = _python_dispatch.TorchDispatchMode  # Sees every operation: measures the memory of a call.

# --- Transforms of torch.func. peek_interpreter_stack tells a user's own vmap from ours.
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor  # Whether a transform wraps a tensor.
peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack  # The innermost transform, or None.
temporarily_clear_interpreter_stack = _pyfunctorch.temporarily_clear_interpreter_stack  # A block outside of all.
get_dynamic_layer_stack_depth = torch._C._functorch.get_dynamic_layer_stack_depth  # Number of open transforms.
pop_dynamic_layer_stack = torch._C._functorch.pop_dynamic_layer_stack  # Ends the innermost transform.

# The parts of torch.vmap with which we call batching rules directly, rather than through autograd.Function.
TransformType = _pyfunctorch.TransformType  # Tells a vmap from other transforms.
VmapInterpreter = _pyfunctorch.VmapInterpreter  # Its level and batch size, and a block in which it is suspended.
unwrap_batched = torch._C._functorch._unwrap_batched  # The values of a batched tensor, and their batch dimension.
add_batch_dim = torch._C._functorch._add_batch_dim  # The inverse.

# --- Modes of a thread. They are read at every call of every member: bound here, we save the attribute lookups.
len_torch_function_stack = torch._C._len_torch_function_stack  # How many function modes are on.
len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack  # How many dispatch modes are on.
disable_current_modes = _python_dispatch._disable_current_modes  # A block without dispatch modes.

# To restore modes that an exception has left on, as context managers cannot be exited from elsewhere.
get_current_function_mode_stack = _overrides._get_current_function_mode_stack  # The function modes themselves.
get_torch_function_state: Callable[[], Any] = torch._C._get_torch_function_state  # type: ignore[attr-defined]  # On or off.
set_torch_function_state: Callable[[Any], None] = torch._C._set_torch_function_state  # type: ignore[attr-defined]
is_fwd_grad_enabled = torch._C._is_fwd_grad_enabled  # Forward-mode differentiation on or off.
set_fwd_grad_enabled = torch._C._set_fwd_grad_enabled

# Dispatch modes. If a release lacks a name in the functions below, the first step of a trainer fails. torch keeps flags
# next to the stack of modes. Some came after torch 2.6: we restore those that the release has.
_DISPATCH_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]


def dispatch_state() -> tuple[list[Any], list[Any]]:
    """Return the thread's dispatch modes, and torch's flags about them."""
    return (
        _python_dispatch._get_current_dispatch_mode_stack(),
        [getattr(_python_dispatch, name) for name in _DISPATCH_FLAGS],
    )


def set_dispatch_state(value: tuple[list[Any], list[Any]]) -> None:
    """Set what :func:`dispatch_state` returned."""
    modes, flags = value
    now = _python_dispatch._get_current_dispatch_mode_stack()
    same = next((i for i, (a, b) in enumerate(zip(now, modes, strict=False)) if a is not b), min(len(now), len(modes)))
    for mode in reversed(now[same:]):
        # torch's own modes are popped by a key.
        _python_dispatch._pop_mode(getattr(mode, "_mode_key", None))
    for mode in modes[same:]:
        _python_dispatch._push_mode(mode)
    for name, flag in zip(_DISPATCH_FLAGS, flags, strict=True):
        setattr(_python_dispatch, name, flag)
        # One flag has a copy in C, which guards of compiled code read.
        mirror = getattr(_python_dispatch, f"set{name}".replace("_is_in_any_mode", "_is_in_mode"), None)
        if mirror is not None:
            mirror(flag)


# --- torch.compile. It is imported when something is compiled, as the import takes a second. If a release lacks a name,
# its first use fails.


def compiler_state() -> tuple[Any, Any] | None:
    """Return the stance and the frame callback of torch.compile, or None if it is not imported."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return None if frames is None else (frames._stance, torch._C._dynamo.eval_frame.get_eval_frame_callback())


def set_compiler_state(value: tuple[Any, Any] | None) -> None:
    """Set what :func:`compiler_state` returned. The public ``set_stance`` cannot restore an unknown stance."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:
        # None means that it was imported since then: restore the defaults.
        stance, callback = (frames.DynamoStance(), None) if value is None else value
        frames._stance = stance  # type: ignore[attr-defined]
        torch._C._dynamo.eval_frame.set_eval_frame(callback)


def lookup_backend(name: str) -> Callable[..., Any]:
    """Return the ``torch.compile`` backend of this name."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def is_compiled(module: nn.Module) -> bool:
    """Return whether this module itself, not a submodule, was compiled by torch.compile or ``Module.compile``."""
    # If a release lacks the first, calls for all members run the compiled code, which does not support that, and fail.
    return "dynamo_ctx" in module.__dict__ or module._compiled_call_impl is not None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the original module of one that torch.compile returned, and any other module as it is."""
    # If a release lacks the attribute, the wrapper is trained, and names of parameters have its prefix.
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


# --- The processor.


def cpu_has_bf16() -> bool:
    """Return whether the processor has instructions for products in bfloat16; True if that is unknown."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))
    # Earlier releases of torch have only these functions, for x86.
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if platform.machine().lower() not in ("x86_64", "amd64") or None in asked:
        return True
    return any(ask() for ask in asked if ask is not None)


# --- Private attributes of objects, used throughout the library. No others are.
ATTRIBUTES = {
    # Of tensors.
    "_version": "counts in-place writes, to detect them; without it, calls that read it fail",
    "_base": "the tensor of which a tensor is a view; without it, calls that read it fail",
    "_is_param": "makes isinstance(…, nn.Parameter) true; without it, models that check this see an ordinary tensor",
    # Of modules: the dictionaries that their __setattr__ fills. We save and restore them.
    "_parameters": "where weights are swapped; without it, the first generation fails",
    "_buffers": "saved and restored; without it, the first generation fails",
    "_modules": "saved and restored; without it, the first generation fails",
    "_non_persistent_buffers_set": "the buffers that are not saved; without it, making a trainer fails",
    "_forward_hooks": "modules with hooks are not called for members together; without it, the first generation fails",
    "_forward_pre_hooks": "the same before the forward",
    # Of modules: their calls. Module.__call__ calls _compiled_call_impl if it is not None, which is where
    # Module.compile() stores its result, and _call_impl otherwise. The only other way to intercept calls would be a
    # subclass of each module's class.
    "_compiled_call_impl": "where we intercept calls; without it, no call is intercepted and members run one by one",
    "_call_impl": "hooks and forward of an intercepted module; without it, its calls fail",
}
