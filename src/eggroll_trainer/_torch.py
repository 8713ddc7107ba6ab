"""Every name of torch's that is not public, in one place; other modules import them from here.

A name is torch's own, without its leading underscore. None has a public twin that does the same in every release from
2.6 on. In a release that lacks one, the import of this package ends with an error that names it, unless something else
is said beside it. ``tests/test_torch_names.py`` says what is relied on.
"""

from __future__ import annotations

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
TreeSpec = _pytree.TreeSpec  # The structure without the leaves: compared, and told apart by its text.
tree_flatten = _pytree.tree_flatten  # Leaves and structure; dataclasses and the like that users registered count.
tree_unflatten = _pytree.tree_unflatten  # Back again.
tree_leaves = _pytree.tree_leaves  # The leaves alone.
tree_map = _pytree.tree_map  # A function of each leaf.

# --- What torch.nn calls, for which there are rules: they are the keys by which its calls are recognised. In a release
# where torch.nn calls something else, torch.vmap does without the rule: slower, or the members run one by one.
weight_norm: Any = torch._weight_norm  # By nn.utils.parametrizations.weight_norm.
pack_padded_sequence: Any = torch._pack_padded_sequence  # By the nn.utils.rnn function.
pad_packed_sequence: Any = torch._pad_packed_sequence  # By the nn.utils.rnn function.
nested_tensor_from_mask_left_aligned: Any = torch._nested_tensor_from_mask_left_aligned  # By nn.TransformerEncoder.
has_compatible_shallow_copy_type: Any = torch._has_compatible_shallow_copy_type  # By Module.to; it looks at no values.

# --- Modules.
NormBase = _batchnorm._NormBase  # The base of all layers with running statistics, also of users' own.
global_forward_hooks = _module._global_forward_hooks  # Hooks for all modules: members are not put together then.
global_forward_pre_hooks = _module._global_forward_pre_hooks  # The same before the forward.

# --- Tensor subclasses. Documented under "Extending PyTorch", but of a private module.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass  # Operations on one without __torch_function__.
TorchDispatchMode = _python_dispatch.TorchDispatchMode  # Sees every operation: measures the memory of a call.

# --- Transforms of torch.func. Without peek_interpreter_stack nobody could tell a user's own vmap from ours.
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor  # A tensor of one that is under way.
peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack  # The innermost one, or None.
temporarily_clear_interpreter_stack = _pyfunctorch.temporarily_clear_interpreter_stack  # A block outside of all.
get_dynamic_layer_stack_depth = torch._C._functorch.get_dynamic_layer_stack_depth  # How many are open.
pop_dynamic_layer_stack = torch._C._functorch.pop_dynamic_layer_stack  # Ends the innermost one.

# The parts of torch.vmap, for a batching rule that is called without the way around through autograd.Function.
TransformType = _pyfunctorch.TransformType  # Tells a vmap from other transforms.
VmapInterpreter = _pyfunctorch.VmapInterpreter  # Its level and batch size, and the block in which it is suspended.
unwrap_batched = torch._C._functorch._unwrap_batched  # A tensor's values, and which of their dimensions is batched.
add_batch_dim = torch._C._functorch._add_batch_dim  # The reverse.

# --- Modes of a thread. They are asked at every call of every member: bound here, they skip the way through modules.
len_torch_function_stack = torch._C._len_torch_function_stack  # How many function modes are on.
len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack  # How many dispatch modes are on.
disable_current_modes = _python_dispatch._disable_current_modes  # A block without dispatch modes.

# To put back what an exception left on; the blocks that set these can only be left by who entered them.
get_current_function_mode_stack = _overrides._get_current_function_mode_stack  # The function modes themselves.
get_torch_function_state: Callable[[], Any] = torch._C._get_torch_function_state  # type: ignore[attr-defined]  # On or off.
set_torch_function_state: Callable[[Any], None] = torch._C._set_torch_function_state  # type: ignore[attr-defined]
is_fwd_grad_enabled = torch._C._is_fwd_grad_enabled  # Forward-mode differentiation on or off.
set_fwd_grad_enabled = torch._C._set_fwd_grad_enabled

# The dispatch modes themselves; in a release that lacks what the functions use, the first step of a trainer fails.
# The flags are kept by torch beside their stack. Some came after torch 2.6: what a release lacks is not put back.
_DISPATCH_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]


def dispatch_state() -> tuple[list[Any], list[Any]]:
    """Return the thread's dispatch modes, and the flags that go with them."""
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
        # Modes of torch's own lie in places of their own, which they name.
        _python_dispatch._pop_mode(getattr(mode, "_mode_key", None))
    for mode in modes[same:]:
        _python_dispatch._push_mode(mode)
    for name, flag in zip(_DISPATCH_FLAGS, flags, strict=True):
        setattr(_python_dispatch, name, flag)
        # The guards of compiled code ask for one of them in C.
        mirror = getattr(_python_dispatch, f"set{name}".replace("_is_in_any_mode", "_is_in_mode"), None)
        if mirror is not None:
            mirror(flag)


# --- torch.compile. It is not imported before somebody compiles: that takes a second. A name that a release lacks is
# noticed where it is used.


def compiler_state() -> tuple[Any, Any] | None:
    """Return the stance and the hook of torch.compile, or None where it is not imported."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return None if frames is None else (frames._stance, torch._C._dynamo.eval_frame.get_eval_frame_callback())


def set_compiler_state(value: tuple[Any, Any] | None) -> None:
    """Set what :func:`compiler_state` returned; there is no public way to set a stance without knowing what it says."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:
        # Where it was imported meanwhile, nothing was set before.
        stance, callback = (frames.DynamoStance(), None) if value is None else value
        frames._stance = stance  # type: ignore[attr-defined]
        torch._C._dynamo.eval_frame.set_eval_frame(callback)


def lookup_backend(name: str) -> Callable[..., Any]:
    """Return the backend of torch.compile of this name, to be called by another one."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile, or ``Module.compile``, has made something of this module, not of those below it."""
    # Without the first, a call for all members runs what was compiled, which knows nothing of them, and fails.
    return "dynamo_ctx" in module.__dict__ or module._compiled_call_impl is not None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside of what torch.compile returned, which has the user's names, or the model as it is."""
    # Without the attribute the wrapper is trained: names of parameters begin with another prefix.
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


# --- Attributes of objects. They are used where they are needed, and no others are.
ATTRIBUTES = {
    # Of tensors.
    "_version": "counts writes in place, to notice them; without it a call fails that asks for it",
    "_base": "of what a tensor is a view; without it a call fails that asks for it",
    "_is_param": "isinstance(…, nn.Parameter) by it; without it models that ask so see an ordinary tensor",
    # Of modules: the dictionaries that their __setattr__ fills, noted and put back as they were.
    "_parameters": "places where weights are swapped; without it the first generation fails",
    "_buffers": "noted and put back; without it the first generation fails",
    "_modules": "noted and put back; without it the first generation fails",
    "_non_persistent_buffers_set": "the buffers that are not saved; without it a trainer fails to be made",
    "_forward_hooks": "modules with hooks are not called for members together; without it the first turn fails",
    "_forward_pre_hooks": "the same before the forward",
    # Of modules: their calls. Module.__call__ calls the first if it is not None, where Module.compile() has put what it
    # compiled, and otherwise the second. Without it only a subclass of each module's class could intercept calls.
    "_compiled_call_impl": "where calls are intercepted; without it no call is noticed and members run one by one",
    "_call_impl": "hooks and forward of a module whose call was intercepted; without it its call fails",
}
