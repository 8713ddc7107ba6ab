"""Facts about this machine: versions, processor, devices, extras, and what is fast."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

# Extras that only developers need.
_HIDDEN = ("bench", "dev")

# Instruction sets that matter for speed, by their names in Linux. The last ones of each family are for bfloat16.
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def versions() -> dict[str, str]:
    """Return the versions of the library and of the packages that it needs."""
    from .. import __version__

    packages = ("numpy", "greenlet", "tqdm")
    return {
        "eggroll_trainer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def processor() -> dict[str, Any]:
    """Return facts about the processor."""
    text = ""
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags is not None
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in _FEATURES if known and flags is not None and name in flags[1].split()],
        "features_known": known,
    }


def devices() -> list[dict[str, Any]]:
    """Return the accelerators."""
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found.append(
                {"device": f"cuda:{i}", "name": properties.name, "gib": round(properties.total_memory / 2**30, 1)}
            )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def extras() -> dict[str, dict[str, str | None]]:
    """Return, for each extra, its packages with their versions; None for missing ones."""
    try:
        requirements = importlib.metadata.requires("eggroll_trainer") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package and extra and extra[1] not in _HIDDEN and package[0] != "eggroll_trainer":
            found.setdefault(extra[1], {})[package[0]] = _version(package[0])
    return found


def bfloat16_over_float32() -> float:
    """Return the time of a matrix product on the processor in bfloat16, relative to float32."""
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        products[dtype] = functools.partial(torch.nn.functional.linear, x, weight)
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    # In turn, without the first two rounds, which warm up.
    for i in range(12):
        for dtype, product in products.items():
            begin = time.perf_counter()
            product()
            if i > 1:
                seconds[dtype].append(time.perf_counter() - begin)
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])


def compiler() -> str | None:
    """Return the C++ compiler that ``torch.compile`` would use for a processor."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def advice(machine: dict[str, Any]) -> list[str]:
    """Return sentences about what is fast on this machine and what is not.

    Args:
        machine: The facts that :func:`everything` collects.
    """
    cpu, lines = machine["processor"], []
    release = tuple(map(int, re.findall(r"\d+", machine["versions"]["torch"])[:2]))
    if release < (2, 8):
        lines.append(f"compile=True runs eagerly with torch {machine['versions']['torch']}: take 2.8 or later")
    elif machine["compiler"] is None and not machine["devices"]:
        lines.append("compile=True runs eagerly: there is no C++ compiler; install g++")
    else:
        lines.append("compile=True works, and pays off after some seconds: try it with eggroll bench")
    ratio = machine["bfloat16_over_float32"]
    if ratio > 1.1:
        lines.append(f"bfloat16 is slow on this processor: a product takes {ratio:.1f} times as long as in float32")
    elif ratio < 0.9:
        lines.append(
            f"bfloat16 is fast on this processor: a product takes {ratio:.2f} of the time in float32; try"
            " evaluation_dtype=torch.bfloat16"
        )
    if cpu["threads"] < cpu["cores"]:
        lines.append(
            f"torch uses {cpu['threads']} of {cpu['cores']} cores: OMP_NUM_THREADS={cpu['cores']} uses all, or torchrun"
            f" --nproc-per-node {cpu['cores'] // cpu['threads']} shares the population"
        )
    if machine["devices"]:
        lines.append(f"models are trained on the GPU with device={machine['devices'][0]['device']!r}")
    elif cpu["cores"] <= 4:
        lines.append("there is no GPU and few cores: small models, or populations of some hundred, are quick")
    return lines


def everything() -> dict[str, Any]:
    """Return all facts, with the advice."""
    found: dict[str, Any] = {
        "versions": versions(),
        "processor": processor(),
        "devices": devices(),
        "compiler": compiler(),
        "extras": extras(),
        "bfloat16_over_float32": bfloat16_over_float32(),
    }
    return {**found, "advice": advice(found)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
