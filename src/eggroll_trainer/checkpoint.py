"""Checkpoint files: written atomically, read without running code."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def write_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path``; whenever the process is killed, the file is the old one or the whole new one."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's own mode is for the owner alone; a checkpoint has the mode of any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def read_checkpoint(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """Return the state in the file at ``path``, its tensors on ``device``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds anything but data, or is no checkpoint of a trainer.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than data and was not loaded: it could run code. {error}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    check_format(state, str(path))
    return state


def check_format(state: Any, origin: str) -> None:
    """Raise ``ValueError`` unless ``state`` is what a trainer's ``state_dict`` returned, in a format known here."""
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{origin} is not the state of a trainer")
    if state["format"] != FORMAT:
        raise ValueError(f"{origin} has format {state['format']!r}; this version reads format {FORMAT}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # Without it the new name may not survive a power cut. Not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
