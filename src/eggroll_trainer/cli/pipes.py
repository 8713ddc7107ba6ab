"""Handles pipes whose reader has ended, as in ``eggroll rl --help | head``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def pipes_may_close() -> Iterator[None]:
    """Inside the block, discard output to closed pipes, instead of ending the command: a run continues."""
    streams = sys.stdout, sys.stderr
    wrapped: list[Any] = [None if stream is None else _Stream(stream) for stream in streams]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in wrapped:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


class _Stream:
    """A text stream that discards its output once its pipe is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._into_nothing()
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write the buffer."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._into_nothing()

    def _into_nothing(self) -> None:
        # Redirect the file descriptor too, for text in the buffer, which is flushed when the interpreter exits.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
