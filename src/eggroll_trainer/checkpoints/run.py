"""What is kept of a run: the face that trainers show to those who keep it."""

from __future__ import annotations

from os import PathLike
from typing import Any, Protocol

from .generation import Generation, Settings


class Engine(Protocol):
    """What processes share."""

    def from_main(self, function: Any) -> Any:
        """Run ``function`` in the first process, and return its result in all of them."""


class Run(Protocol):
    """A trainer, as checkpoints and logs see it."""

    generation: int
    history: dict[str, list[Any]]
    last_generation: Generation | None

    @property
    def engine(self) -> Engine:
        """Who evaluates, and how many processes take part."""

    @property
    def maximize(self) -> bool:
        """Whether higher scores are better."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one to write."""

    def settings(self) -> Settings:
        """Return the record of what a generation depends on."""

    def checksum(self) -> int:
        """Return a number that tells parameters apart that differ in any bit."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""

    def repeat(self, generation: Generation) -> dict[str, Any]:
        """Make the step of a logged generation again."""
