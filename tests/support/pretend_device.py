"""A pretend accelerator: a device of torch's whose memory is the CPU's, for machines that have none.

Its tensors are ordinary ones that say they are on the device ``pretend:0``. An operation on them is carried out by the
CPU; if it is given a tensor of the CPU as well, other than a number, it raises as CUDA's would. Once set up it stays
for the rest of the process.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.dlpack import from_dlpack

NAME = "pretend"
CPU = torch.device("cpu")

# The operations that take tensors of several devices.
_ACROSS = ("aten::copy_", "aten::_copy_from", "aten::_to_copy")

# Tensors with the same memory on another device are made by way of DLPack, the format in which libraries exchange them:
# see dlpack.h.
_ON_CPU, _ON_PRETEND = 1, 12
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


# What torch's tensors refer to, by its address.
_held: dict[int, Any] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _release(address: int) -> None:
    _held.pop(address, None)


_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def _alias(tensor: Tensor, device_type: int) -> Tensor:
    """Return a tensor with the same memory on another device."""
    return _tensor(tensor, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), device_type)


def _tensor(
    owner: Any, address: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], device_type: int
) -> Tensor:
    kind = str(dtype).removeprefix("torch.").rstrip("0123456789")
    sizes = ctypes.c_int64 * max(1, len(shape))
    own_shape, own_strides = sizes(*shape), sizes(*strides)
    described = _DLManagedTensor(
        address, device_type, 0, len(shape), _CODES[kind], 8 * dtype.itemsize, 1,
        ctypes.addressof(own_shape), ctypes.addressof(own_strides), 0, None, ctypes.cast(_release, ctypes.c_void_p),
    )  # fmt: skip
    _held[ctypes.addressof(described)] = described, own_shape, own_strides, owner
    return from_dlpack(_capsule(ctypes.addressof(described), b"dltensor", None))


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.pretend`` is."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        self.generator.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Generator(torch.Generator):
    """The CPU's stands for the device's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return torch._C.Generator("cpu" if torch.device(device).type == NAME else device)


def _is_pretend(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.device.type == NAME) or (
        isinstance(value, torch.device) and value.type == NAME
    )


class _Schema:
    """What there is to know of an operation."""

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.name, self.across = schema.name, schema.name in _ACROSS
        self.outs = [argument.name for argument in schema.arguments if argument.is_out]
        self.draws = any(argument.name == "generator" for argument in schema.arguments)
        self.is_view = any(value.alias_info is not None for value in schema.returns)
        self.tensors = [str(argument.type) == "Tensor" for argument in schema.arguments]


_schema = functools.cache(_Schema)


def _fallback(module: _Module, op: Any, *args: Any, **kwargs: Any) -> Any:
    schema = _schema(op)
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    foreign = [tensor for tensor in tensors if not _is_pretend(tensor) and tensor.ndim]
    if foreign and not schema.across and len(foreign) < len(tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {schema.name} of {NAME} got one of shape"
            f" {list(foreign[0].shape)} on {foreign[0].device}"
        )
    own: dict[int, Tensor] = {}
    inner = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and _is_pretend(leaf):
            leaf, original = _alias(leaf, _ON_CPU), leaf
            own[id(leaf)] = original
        inner.append(CPU if isinstance(leaf, torch.device) else leaf)
    args, kwargs = tree_unflatten(inner, spec)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    args = tuple(
        _as_tensor(value, wide) if is_tensor and not isinstance(value, Tensor) else value
        for is_tensor, value in zip(schema.tensors, args, strict=False)
    )
    # Where a result is to be written that may have another shape.
    outs = {key: leaf for key in schema.outs if isinstance(leaf := kwargs.get(key), Tensor) and id(leaf) in own}
    for key, leaf in outs.items():
        kwargs[key] = torch.empty_like(leaf)
        own[id(kwargs[key])] = own[id(leaf)]
    if schema.draws:
        kwargs.setdefault("generator", module.generator)
    result = op(*args, **kwargs)
    for key, leaf in outs.items():
        if leaf.shape == kwargs[key].shape:
            leaf.copy_(kwargs[key])
        else:
            own[id(leaf)].data = _alias(kwargs[key], _ON_PRETEND)
    goes = kwargs.get("device") is None or any(_is_pretend(leaf) for leaf in leaves)
    # A view of an ordinary tensor is one in inference mode as well.
    ordinary = schema.is_view and own and not all(tensor.is_inference() for tensor in own.values())

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in own or not goes:
            return own.get(id(value), value)
        with torch.inference_mode(not ordinary and torch.is_inference_mode_enabled()):
            return _alias(value, _ON_PRETEND)

    return back(result) if isinstance(result, Tensor) else tree_map(back, result)


def _as_tensor(number: Any, wide: bool) -> Tensor:
    """A Python number that an operation had for a tensor, which it is handed on as."""
    return torch.tensor(number, dtype=torch.float64 if wide and isinstance(number, float) else None, device=CPU)


def _clone_storage(original: Callable[..., Any], storage: Any) -> Any:
    if storage.device.type != NAME:
        return original(storage)
    copied = torch.empty(storage.nbytes(), dtype=torch.uint8, device=NAME).untyped_storage()
    ctypes.memmove(copied.data_ptr(), storage.data_ptr(), storage.nbytes())
    return copied


def _set(
    self: Tensor, storage: Any, offset: int = 0, size: Sequence[int] | None = None, stride: Sequence[int] = (1,)
) -> Tensor:
    size = [storage.nbytes() // self.itemsize] if size is None else size
    address = storage.data_ptr() + offset * self.itemsize
    self.data = _tensor(storage, address, self.dtype, size, stride, _ON_PRETEND)
    return self


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    target, source = (_alias(t, _ON_CPU) if _is_pretend(t) else t for t in (self, source))
    target.copy_(source)
    return self


def _gru_cell(
    own: Tensor, recurrent: Tensor, state: Tensor, bias: Tensor | None = None, recurrent_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """An operation that no CPU has."""
    own = own if bias is None else own + bias
    recurrent = recurrent if recurrent_bias is None else recurrent + recurrent_bias
    (reset, update, new), (own_reset, own_update, own_new) = recurrent.chunk(3, -1), own.chunk(3, -1)
    new = (own_new + (own_reset + reset).sigmoid() * new).tanh()
    return new + (own_update + update).sigmoid() * (state - new), new


@functools.cache
def set_up() -> torch.device:
    """Make the device, and return it."""
    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch.Generator = _Generator  # type: ignore[misc]
    # For there is nothing that allocates memory but for tensors.
    clone = functools.partialmethod(functools.partial(_clone_storage, torch.UntypedStorage.clone))
    torch.storage._StorageBase.clone = clone  # type: ignore[assignment]
    fallback: Callable[..., Any] = functools.partial(_fallback, module)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(fallback, "PrivateUse1")
    aten.impl("copy_", _copy, "PrivateUse1")
    aten.impl("_thnn_fused_gru_cell", _gru_cell, "PrivateUse1")
    # Which a device has under a name of its own.
    convolution = functools.partial(fallback, torch.ops.aten.convolution.default)
    aten.impl("convolution_overrideable", convolution, "PrivateUse1")
    for overload in ("source_Storage", "source_Storage_storage_offset"):
        aten.impl(f"set_.{overload}", _set, "PrivateUse1")
    _libraries.extend([everything, aten])
    return torch.device(NAME, 0)


# They end with their objects.
_libraries: list[Any] = []
