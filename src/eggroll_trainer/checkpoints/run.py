"""The interface of a trainer that checkpoints and logs use."""

from __future__ import annotations

from os import PathLike
from typing import Any, Protocol

from .generation import Generation, Settings


class Engine(Protocol):
    """The engine of a trainer."""

    def from_main(self, function: Any) -> Any:
        """Run ``function`` in the first process, and return its result in all of them."""


class Run(Protocol):
    """A trainer."""

    generation: int
    history: dict[str, list[Any]]
    last_generation: Generation | None

    @property
    def engine(self) -> Engine:
        """The engine, which tells how many processes take part."""

    @property
    def maximize(self) -> bool:
        """Whether higher scores are better."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""

    def settings(self) -> Settings:
        """Return the settings that a generation depends on."""

    def checksum(self) -> int:
        """Return a checksum over every bit of the parameters."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state."""

    def repeat(self, generation: Generation) -> dict[str, Any]:
        """Repeat the step of a logged generation, and return its metrics."""
