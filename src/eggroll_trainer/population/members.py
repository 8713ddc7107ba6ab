"""What a population offers to the ways of calling it that have modules of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import TreeSpec
from ..perturbation.sample import Perturbations
from .forward import Call, Forwards
from .opened import Opened


class Members(Protocol):
    """The members of a population; see :class:`~eggroll_trainer.Population`."""

    model: nn.Module
    perturbations: Perturbations
    forwards: Forwards
    first: int
    generation: int
    audit: Any

    def __len__(self) -> int: ...

    @property
    def training(self) -> Mapping[nn.Module, bool]:
        """Modules whose training mode is to differ from the model's."""

    def call_of(self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec, dims: Sequence[int | None]) -> Call:
        """Return the call of a module with the leaves of its arguments."""

    def run_opened(
        self,
        call: Call,
        objects: Sequence[Any],
        held: list[Tensor],
        held_dims: Sequence[int | None],
        *,
        spend: bool = False,
    ) -> Opened:
        """Make a call with objects among its arguments or results."""

    def holding(self, index: int) -> contextlib.AbstractContextManager[list[str]]:
        """Have the model hold one member's weights inside the block."""

    def member_key(self, index: int) -> tuple[int | str, ...]:
        """Return the key of the random numbers that one member's evaluation draws."""

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Return the generator of one member's random numbers."""

    def warn(self, message: str) -> None:
        """Give a warning, if it has not been given yet."""
