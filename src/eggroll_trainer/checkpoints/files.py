"""Checkpoint files: written atomically, read without running code."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from .history import pack, unpack

FORMAT = 1


def write_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path`` atomically: if the process is killed, the file is the old or the complete new one.

    Raises:
        TypeError: ``state`` holds something that can only be loaded by running code.
    """
    if "history" in state:
        state = {**state, "history": pack(state["history"])}
    # Replace the target of a link, not the link.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with _checksums():
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if unsafe:
            raise TypeError(
                f"the state holds {', '.join(unsafe)}, which could not be loaded without running code; keep only"
                " tensors, numbers and strings in the state of an optimizer or scheduler"
            )
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state in the file at ``path``, with tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds more than data, or is not a checkpoint of a trainer.
    """
    with open(path, "rb") as file:
        # torch does not verify the checksums that it writes.
        if not _is_intact(file):
            raise ValueError(f"{path} is damaged or not a checkpoint")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than data and was not loaded: it could run code") from error
        except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    check_format(state, str(path))
    if "history" in state:
        try:
            state["history"] = unpack(state["history"])
        except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is damaged or not a checkpoint: {error!r}") from error
    return state


def check_format(state: Any, origin: str) -> None:
    """Raise ``ValueError`` unless ``state`` is a trainer's ``state_dict``, in the format of this version."""
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{origin} is not the state of a trainer")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(
            f"{origin} has format {state['format']!r} and this version of eggroll_trainer reads format {FORMAT}: use"
            " the version that wrote it, or a newer one"
        )


def check_same_model(state: dict[str, Any], expected: dict[str, Any], resizable: Collection[str]) -> None:
    """Check that a state has the same parameters, buffers and parameter groups as a trainer's own.

    Args:
        state: The state to check.
        expected: The trainer's own state.
        resizable: Names of tensors whose shape may differ.

    Raises:
        ValueError: The state is of another model.
        KeyError, TypeError, AttributeError: It is damaged.
    """
    there, here = (
        {name: tuple(value.shape) for name, value in {**s["centre"]["parameters"], **s["untrained"]}.items()}
        for s in (state, expected)
    )
    groups_there, groups_here = ([list(group["names"]) for group in s["param_groups"]] for s in (state, expected))
    differing = [
        name
        for name in {**here, **there}
        if here.get(name) != there.get(name) and not (name in resizable and name in here and name in there)
    ]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint is of another model: {len(differing)} parameters or buffers differ, the first is {name!r}"
            f" with shape {there.get(name, 'missing')} in the file and {here.get(name, 'missing')} in the model"
        )
    if groups_there != groups_here:
        raise ValueError(f"the checkpoint has the parameter groups {groups_there}, this trainer has {groups_here}")


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _is_intact(file: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error):
        return False


def _sync_folder(folder: Path) -> None:
    # Without this, the new name may be lost in a power cut. Not every system can open a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
