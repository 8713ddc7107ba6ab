"""Engines, which distribute the chunks of a population among processes and machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engine import Chunk, Engine, Evaluator, LocalEngine, Outcome
from .process_group import ProcessGroupEngine, is_launched, local_device

if TYPE_CHECKING:
    from .ray_engine import RayEngine

__all__ = [
    "Chunk",
    "Engine",
    "Evaluator",
    "LocalEngine",
    "Outcome",
    "ProcessGroupEngine",
    "RayEngine",
    "local_device",
    "make_engine",
]


def make_engine(engine: str | Engine | None) -> Engine:
    """Return the engine of a name, or an engine itself.

    Args:
        engine: ``"local"``, ``"torch"``, ``"ray"`` or an engine. None stands for ``"torch"`` if the script was started
            by ``torchrun`` or has made a process group of several processes, else for ``"local"``.

    Raises:
        ValueError: There is no engine of that name.
        TypeError: ``engine`` is neither a name nor an engine.
        ModuleNotFoundError: ``"ray"`` was chosen, and Ray is not installed.

    Example:
        >>> make_engine("local").size
        1
    """
    import torch.distributed as dist

    if isinstance(engine, Engine):
        return engine
    if engine is None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        engine = "torch" if several or is_launched() else "local"
    if not isinstance(engine, str):
        raise TypeError(f"engine must be a name, an Engine or None, got {type(engine).__name__}")
    if engine == "local":
        return LocalEngine()
    if engine == "torch":
        return ProcessGroupEngine()
    if engine == "ray":
        return __getattr__("RayEngine")()
    raise ValueError(f"engine must be 'local', 'torch', 'ray' or an Engine, got {engine!r}")


def __getattr__(name: str) -> type[Engine]:
    # Imported late, as Ray is an extra.
    if name == "RayEngine":
        from .ray_engine import RayEngine

        return RayEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
