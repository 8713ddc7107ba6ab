"""The memory budget of an evaluation, and measurements of memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import TorchDispatchMode, tree_leaves

_MB = 2**20

# Upper limits on a CPU. More memory is no faster.
_CPU_CHUNK = 256 * _MB
_CPU_KEPT = 64 * _MB
# From 32 MB on, the C library maps memory anew for every tensor. A call has two to four of its largest tensors alive.
_CPU_CALL = 64 * _MB

# See mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Budget:
    """The memory that an evaluation may use in addition to the model.

    A quarter is for the perturbations of a chunk, a quarter for noise that is kept, and half for the tensors of a
    forward.

    Args:
        total: Bytes. If None, a share of the device's memory, with upper limits on a CPU.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._shares: dict[torch.device, int] = {}

    def chunk_bytes(self, device: torch.device) -> int:
        """Return the bytes for the perturbations of a chunk."""
        share = self._share(device) // 2
        return share if self.total is not None or device.type != "cpu" else min(share, _CPU_CHUNK)

    def held_bytes(self, device: torch.device) -> int:
        """Return the bytes for data of a fitness function for a chunk, such as the caches of a language model."""
        return self._share(device)

    def kept_bytes(self, device: torch.device) -> int:
        """Return the bytes for noise that is kept for the update, besides that of the current chunk."""
        share = self._share(device) // 2
        return share if self.total is not None or device.type != "cpu" else min(share, _CPU_KEPT)

    def call_bytes(self, device: torch.device) -> int:
        """Return the bytes for the tensors that a forward makes."""
        share = self._share(device)
        return share if device.type != "cpu" else min(share, _CPU_CALL)

    def _share(self, device: torch.device) -> int:
        if self.total is not None:
            return self.total // 2
        if device not in self._shares:
            total, free = device_memory(device)
            # A power of two, so that small differences in free memory don't change the chunks of a population.
            self._shares[device] = 1 << (max(1, min(total // 8, free // 4)).bit_length() - 1)
        return self._shares[device]


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the total and the free memory of a device, in bytes."""
    module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        # Memory in torch's cache is free for its tensors.
        return total, free + module.memory_reserved(device) - module.memory_allocated(device)
    # Other devices use the memory of the system.
    values = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)}
    if "MemAvailable" not in values:
        try:
            pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            pages = 4096 * _MB
        return pages, pages
    total, free = values["MemTotal"], values["MemAvailable"]
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        # Raises ValueError if there is no limit: the file contains "max".
        limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            total, free = min(total, limit), min(free, limit - int(file.read()))
    return total, free


class freed_memory_kept:
    """Inside the block, the process keeps up to 256 MB of freed memory, instead of returning it to the system.

    Returned memory must be mapped and zeroed again, page by page. Operations on large activations then take twice as
    long. After the block, the limit is 64 MB, to which the C library adapts by itself in a process with large tensors.
    If environment variables such as ``MALLOC_TRIM_THRESHOLD_`` set these limits, we don't change them.
    """

    _lock = threading.Lock()
    _blocks = 0

    def __enter__(self) -> None:
        self._change(1, 256 * _MB)

    def __exit__(self, *exception: object) -> None:
        self._change(-1, 64 * _MB)

    @classmethod
    def _change(cls, by: int, trim: int) -> None:
        library = _c_library()
        if library is None:
            return
        with cls._lock:
            # Blocks may be nested, and several threads may be in blocks.
            outermost = cls._blocks == (0 if by > 0 else 1)
            cls._blocks += by
            if outermost:
                # Once one of them is set, the library no longer adapts either.
                library.mallopt(_M_MMAP_THRESHOLD, 32 * _MB)
                library.mallopt(_M_TRIM_THRESHOLD, trim)


@functools.cache
def _c_library() -> Any:
    """Return the C library if it is glibc and the user has not set its limits, else None."""
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in chosen):
        return None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
        return library
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory has run out."""
    # Some allocators, such as the CPU's, raise a RuntimeError.
    signs = ("not enough memory: you tried to allocate", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def live_bytes(function: Callable[[], Any]) -> int:
    """Return the peak memory, in bytes, of the tensors that ``function`` makes.

    Existing tensors and views of them don't count.

    Example:
        >>> x = torch.zeros(256)  # 1 kB
        >>> live_bytes(lambda: ((x + 1) + 1) + 1)
        2048
    """
    with _Counting() as counting:
        function()
    return counting.peak


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._found: dict[int, StorageWeakRef] = {}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for reference, _ in self._storages((args, kwargs)):
            if reference.cdata not in self._live:
                self._found[reference.cdata] = reference
        result = func(*args, **kwargs)
        for reference, size in self._storages(result):
            if reference.cdata not in self._found:
                self._live[reference.cdata] = reference, size
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    @staticmethod
    def _storages(value: Any) -> list[tuple[StorageWeakRef, int]]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        return [(StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()) for t in tensors]
