"""What is relied on of torch that is not public: a release that differs fails here first."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import eggroll_trainer
from eggroll_trainer import _torch

SOURCES = Path(eggroll_trainer.__file__).parent
OTHERS = [path for path in sorted(SOURCES.rglob("*.py")) if path.name != "_torch.py"]
# Of these objects no other private attributes are used than those of the table; a trainer's own are its own.
OBJECTS = (torch.ones(()), nn.Linear(1, 1), nn.Linear(1, 1).weight)
FOREIGN = {name for thing in OBJECTS for name in dir(thing)} | {"_orig_mod", "_mode_key", "_is_param"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    """Return the full path of a name that starts at something imported from torch."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, known)
        return None if start is None else f"{start}.{node.attr}"
    return None


def private_names(source: str) -> set[str]:
    """Return the private names of torch's, and the attributes missing in the table, that a module uses."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    paths: set[str] = set()
    attributes: set[str] = set()
    strings: set[str] = set()
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).partition(".")[0] == "torch":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] == "torch"]
            known |= {a.asname or "torch": a.name if a.asname else "torch" for a in names}
            paths |= {alias.name for alias in names}
        elif isinstance(node, ast.ImportFrom) and node.module == "_torch":
            paths |= {f"_torch.{alias.name}" for alias in node.names if is_private(alias.name)}
    paths |= set(known.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = dotted(node, known)
            if path is not None:
                paths.add(path)
            elif isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
            else:
                attributes.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    found = {path for path in paths if any(map(is_private, path.removeprefix("_torch").split(".")))}
    attributes |= strings - own
    return found | {name for name in attributes & FOREIGN if is_private(name) and name not in _torch.ATTRIBUTES}


@pytest.mark.parametrize("path", OTHERS, ids=[str(path.relative_to(SOURCES)) for path in OTHERS])
def test_private_names_are_used_in_one_file_alone(path: Path) -> None:
    assert private_names(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\nx = torch._C._set_grad_enabled(True)", "torch._C._set_grad_enabled"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.nn.modules.batchnorm import _NormBase as Base", "torch.nn.modules.batchnorm._NormBase"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch import overrides\noverrides._pop_mode()", "torch.overrides._pop_mode"),
        ("from .._torch import _pytree", "_torch._pytree"),
        ("def f(tensor): return tensor._is_view()", "_is_view"),
        ("def f(module): return getattr(module, '_backward_hooks')", "_backward_hooks"),
    ],
)
def test_a_private_name_is_found(source: str, found: str) -> None:
    assert found in private_names(source)


def test_the_table_of_attributes_lists_what_is_used_and_no_more() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in OTHERS)
    assert [name for name in _torch.ATTRIBUTES if not re.search(rf"\b{name}\b", text)] == []


Point = namedtuple("Point", ["x", "y"])


def test_pytree_takes_containers_apart_and_puts_them_together() -> None:
    value = {"a": [1, (2, None)], "b": Point(3, 4)}
    leaves, spec = _torch.tree_flatten(value)
    assert leaves == [1, 2, None, 3, 4] == _torch.tree_leaves(value)
    assert _torch.tree_unflatten(leaves, spec) == value
    assert isinstance(spec, _torch.TreeSpec)
    for other, same in ((value, True), ({"a": 1}, False), ({"a": [1, (2, None)], "b": (3, 4)}, False)):
        assert (spec == _torch.tree_flatten(other)[1]) == (str(spec) == str(_torch.tree_flatten(other)[1])) == same
    assert _torch.tree_map(lambda x: x and -x, value) == {"a": [-1, (-2, None)], "b": Point(-3, -4)}


class Calls(BaseTorchFunctionMode):
    """Notes the operations that torch.nn asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_weight_norm_is_what_torch_nn_calls() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with Calls() as calls:
        layer(torch.ones(1, 3))
    assert _torch.weight_norm in calls.seen


def test_packing_and_padding_are_what_torch_nn_calls() -> None:
    with Calls() as calls:
        packed = nn.utils.rnn.pack_padded_sequence(torch.ones(3, 2, 1), torch.tensor([3, 1]))
        nn.utils.rnn.pad_packed_sequence(packed)
    assert _torch.pack_padded_sequence in calls.seen
    assert _torch.pad_packed_sequence in calls.seen


def test_nested_tensors_are_asked_for_by_transformers_and_not_taken_after_a_no() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    with torch.no_grad(), Calls() as calls:
        model(torch.ones(1, 3, 4), src_key_padding_mask=torch.tensor([[False, False, True]]))
    assert _torch.nested_tensor_from_mask_left_aligned in calls.seen


def test_moving_a_module_asks_whether_a_shallow_copy_will_do() -> None:
    with Calls() as calls:
        nn.Linear(1, 1).to(torch.float64)
    assert _torch.has_compatible_shallow_copy_type in calls.seen


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.InstanceNorm2d(2), nn.SyncBatchNorm(2)])
def test_layers_with_running_statistics_have_one_base(layer: nn.Module) -> None:
    assert isinstance(layer, _torch.NormBase)
    assert not isinstance(nn.GroupNorm(1, 2), _torch.NormBase)


def test_global_hooks_are_seen() -> None:
    for register, hooks in [
        (nn.modules.module.register_module_forward_hook, _torch.global_forward_hooks),
        (nn.modules.module.register_module_forward_pre_hook, _torch.global_forward_pre_hooks),
    ]:
        assert not hooks
        handle = register(lambda *args: None)
        assert hooks
        handle.remove()


class Doubled(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "overridden"


def test_subclasses_are_ordinary_tensors_inside_of_the_block() -> None:
    tensor = torch.ones(2).as_subclass(Doubled)
    assert torch.sum(tensor) == "overridden"
    with _torch.DisableTorchFunctionSubclass():
        assert torch.sum(tensor).item() == 2
    assert torch.sum(tensor) == "overridden"


class Seen(_torch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_are_counted_switched_off_and_put_back() -> None:
    nothing = _torch.dispatch_state()
    assert _torch.len_torch_dispatch_stack() == 0
    with Seen() as seen:
        within = _torch.dispatch_state()
        assert within[0] == [seen] and within != nothing
        assert _torch.len_torch_dispatch_stack() == 1
        with _torch.disable_current_modes():
            torch.ones(1)
        assert seen.operations == 0
        _torch.set_dispatch_state(nothing)
        torch.ones(1)
        assert seen.operations == 0 and _torch.dispatch_state() == nothing
        _torch.set_dispatch_state(within)
        torch.ones(1)
        assert seen.operations == 1 and _torch.dispatch_state() == within
    assert _torch.dispatch_state() == nothing


def test_function_modes_are_counted() -> None:
    assert _torch.len_torch_function_stack() == len(_torch.get_current_function_mode_stack())
    before = _torch.get_current_function_mode_stack()
    with Calls() as calls:
        assert _torch.get_current_function_mode_stack() == [*before, calls]
        assert _torch.len_torch_function_stack() == 1 + len(before)


def test_the_switch_of_functions_for_subclasses_is_set() -> None:
    before = _torch.get_torch_function_state()
    with _torch.DisableTorchFunctionSubclass():
        inside = _torch.get_torch_function_state()
        assert inside != before
        _torch.set_torch_function_state(before)
        assert _torch.get_torch_function_state() == before
        _torch.set_torch_function_state(inside)
    assert _torch.get_torch_function_state() == before


def test_forward_mode_differentiation_is_switched() -> None:
    assert _torch.is_fwd_grad_enabled()
    _torch.set_fwd_grad_enabled(False)
    try:
        assert not _torch.is_fwd_grad_enabled()
    finally:
        _torch.set_fwd_grad_enabled(True)


def test_transforms_are_seen_left_and_ended() -> None:
    depths = []

    def function(x: Tensor) -> Tensor:
        assert _torch.is_functorch_wrapped_tensor(x)
        assert _torch.peek_interpreter_stack() is not None
        depths.append(_torch.get_dynamic_layer_stack_depth())
        with _torch.temporarily_clear_interpreter_stack():
            assert _torch.peek_interpreter_stack() is None
        return x

    torch.vmap(torch.vmap(function))(torch.ones(2, 2))
    assert depths == [2] and _torch.get_dynamic_layer_stack_depth() == 0
    assert _torch.peek_interpreter_stack() is None
    assert not _torch.is_functorch_wrapped_tensor(torch.ones(1))


def test_a_transform_that_was_left_open_is_ended() -> None:
    for _ in range(2):
        torch._C._functorch._vmap_increment_nesting(2, "error")
    for depth in (2, 1, 0):
        assert _torch.get_dynamic_layer_stack_depth() == depth
        if depth:
            _torch.pop_dynamic_layer_stack()
    assert torch.equal(torch.vmap(torch.sin)(torch.ones(2)), torch.ones(2).sin())


def test_a_vmap_is_lowered_and_its_result_raised_again() -> None:
    def function(x: Tensor) -> Tensor:
        transform = _torch.peek_interpreter_stack()
        assert transform.key() == _torch.TransformType.Vmap
        interpreter = _torch.VmapInterpreter(transform)
        assert interpreter.batch_size() == 3
        values, dim = _torch.unwrap_batched(x, interpreter.level())
        with interpreter.lower():
            assert values.shape == (2, 3) and dim == 1
            assert _torch.peek_interpreter_stack() is None
        assert _torch.unwrap_batched(torch.ones(2), interpreter.level())[1] is None
        raised: Tensor = _torch.add_batch_dim(values * 2, dim, interpreter.level())
        return raised

    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(torch.vmap(function, in_dims=1)(x), 2 * x.T)


def test_a_gradient_is_told_from_a_vmap() -> None:
    def function(x: Tensor) -> Tensor:
        assert _torch.peek_interpreter_stack().key() != _torch.TransformType.Vmap
        return x.sum()

    torch.func.grad(function)(torch.ones(2))


def test_the_stance_of_the_compiler_is_put_back() -> None:
    importlib.import_module("torch._dynamo.eval_frame")
    before = _torch.compiler_state()
    with torch.compiler.set_stance("force_eager"):
        assert _torch.compiler_state() != before
        _torch.set_compiler_state(before)
        assert _torch.compiler_state() == before


def test_a_backend_of_the_compiler_is_found_by_its_name() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return _torch.lookup_backend("eager")(graph, inputs)

    assert torch.compile(lambda x: F.relu(x), backend=backend)(torch.tensor([-1.0])).item() == 0
    assert len(graphs) == 1


def test_what_was_compiled_is_told_and_taken_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some releases warn of their own use of what is deprecated.
        model, in_place = nn.Linear(1, 1), nn.Linear(1, 1)
        compiled: Any = torch.compile(model, backend="eager")
        in_place.compile(backend="eager")
    assert _torch.uncompiled(compiled) is model and _torch.uncompiled(model) is model
    assert _torch.is_compiled(compiled) and _torch.is_compiled(in_place) and not _torch.is_compiled(model)


def test_a_version_counts_writes_and_a_view_knows_its_base() -> None:
    tensor = torch.ones(2, 2)
    view, version = tensor[0], tensor._version
    view.add_(1)
    assert tensor._version > version and view._version == tensor._version
    assert view._base is tensor and tensor._base is None


def test_a_subclass_can_say_that_it_is_a_parameter() -> None:
    tensor = torch.ones(1).as_subclass(Doubled)
    assert not isinstance(tensor, nn.Parameter)
    tensor._is_param = True
    assert isinstance(tensor, nn.Parameter)


def test_a_module_holds_its_parts_in_dictionaries() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("cache", torch.ones(1), persistent=False)
    module.add_module("part", nn.Identity())
    held: dict[str, dict[str, Any]] = module.__dict__
    assert held["_parameters"].keys() == {"weight", "bias"}
    assert held["_buffers"].keys() == {"running_mean", "running_var", "num_batches_tracked", "cache"}
    assert held["_modules"].keys() == {"part"}
    assert module._non_persistent_buffers_set == {"cache"}
    # What is swapped in there is what the forward finds, without being asked what it is.
    held["_parameters"]["weight"] = value = torch.zeros(2)
    assert module.weight is value


def test_the_hooks_of_a_module_are_seen() -> None:
    module = nn.Identity()
    assert not module._forward_hooks and not module._forward_pre_hooks
    module.register_forward_hook(lambda *args: None)
    module.register_forward_pre_hook(lambda *args: None)
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


def test_a_call_is_intercepted_and_made_after_all() -> None:
    module = nn.Linear(1, 1)
    hooked: list[Any] = []
    module.register_forward_hook(lambda *args: hooked.append(args))
    owner = weakref.ref(module)
    x = torch.ones(1)

    def intercept(*args: Any) -> Any:
        called = owner()
        assert called is not None
        return "intercepted", called._call_impl(*args)

    expected = module(x)
    module.__dict__["_compiled_call_impl"] = intercept
    told, result = module(x)
    assert told == "intercepted" and torch.equal(result, expected) and len(hooked) == 2
    del module.__dict__["_compiled_call_impl"]
    assert torch.equal(module(x), expected)
