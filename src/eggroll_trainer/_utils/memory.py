"""How much memory an evaluation may take, and how much it takes."""

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

# What is enough on a CPU: more gains nothing.
_CPU_CHUNK = 256 * _MB
_CPU_KEPT = 64 * _MB
# From 32 MB on the C library maps every tensor anew; a call has two to four of the largest alive at a time.
_CPU_CALL = 64 * _MB

# See mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Budget:
    """The memory that an evaluation may take besides the model.

    A quarter of it is for the perturbations of a chunk, a quarter for noise that is kept, half for the tensors of a
    forward.

    Args:
        total: Bytes; if None, a share of the device's memory, and on a CPU no more than is of use.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._shares: dict[torch.device, int] = {}

    def chunk_bytes(self, device: torch.device) -> int:
        """Return what the perturbations of a chunk may take."""
        share = self._share(device) // 2
        return share if self.total is not None or device.type != "cpu" else min(share, _CPU_CHUNK)

    def held_bytes(self, device: torch.device) -> int:
        """Return what a fitness function may hold at a time for a chunk, such as the caches of a language model."""
        return self._share(device)

    def kept_bytes(self, device: torch.device) -> int:
        """Return what noise may take that is kept for the update, beyond the chunk that is being evaluated."""
        share = self._share(device) // 2
        return share if self.total is not None or device.type != "cpu" else min(share, _CPU_KEPT)

    def call_bytes(self, device: torch.device) -> int:
        """Return what the tensors that a forward makes may take."""
        share = self._share(device)
        return share if device.type != "cpu" else min(share, _CPU_CALL)

    def _share(self, device: torch.device) -> int:
        if self.total is not None:
            return self.total // 2
        if device not in self._shares:
            total, free = device_memory(device)
            # A power of two, so that what else happens to run does not change how a population is cut up.
            self._shares[device] = 1 << (max(1, min(total // 8, free // 4)).bit_length() - 1)
        return self._shares[device]


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of memory that a device has, and how many of them are free."""
    module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        # What torch holds in its cache is free for its tensors.
        return total, free + module.memory_reserved(device) - module.memory_allocated(device)
    # The memory that such a device has is the system's.
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
        # Fails where there is no limit, which reads "max".
        limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            total, free = min(total, limit), min(free, limit - int(file.read()))
    return total, free


class freed_memory_kept:
    """Let the process keep what it frees in the block, up to 256 MB, instead of handing it back to the system at once.

    What is handed back comes anew page by page, zeroed: every operation on large activations then takes as long again
    as its arithmetic. After the block the limit is 64 MB again, to which the C library itself adapts in a process with
    large tensors. Where the environment sets these limits, by ``MALLOC_TRIM_THRESHOLD_`` say, they stay as they are.
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
            # Blocks may lie inside of others, and threads may be in blocks of their own.
            outermost = cls._blocks == (0 if by > 0 else 1)
            cls._blocks += by
            if outermost:
                # Setting either keeps the library from adapting them.
                library.mallopt(_M_MMAP_THRESHOLD, 32 * _MB)
                library.mallopt(_M_TRIM_THRESHOLD, trim)


@functools.cache
def _c_library() -> Any:
    """Return the C library if its allocator is glibc's, with limits that the user has not chosen."""
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in chosen):
        return None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
        return library
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that a tensor did not fit."""
    # Some allocators, such as the CPU's, raise a RuntimeError.
    signs = ("not enough memory: you tried to allocate", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def live_bytes(function: Callable[[], Any]) -> int:
    """Return how many bytes of the tensors made by ``function`` are alive at one time, at most.

    Tensors that it finds, views of them among its results too, don't count.

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
