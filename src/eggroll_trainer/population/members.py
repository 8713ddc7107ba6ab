"""The interface of a population that the modules of this folder use."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import TreeSpec
from ..perturbation.sample import Perturbations
from .forward import Call, Forwards
from .object_calls import ObjectCallResult


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
        """Training modes of modules that differ from those in the model."""

    def call_of(self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec, dims: Sequence[int | None]) -> Call:
        """Return a call of a module from the leaves of its arguments."""

    def run_with_objects(
        self,
        call: Call,
        objects: Sequence[Any],
        held: list[Tensor],
        held_dims: Sequence[int | None],
        *,
        spend: bool = False,
    ) -> ObjectCallResult:
        """Make a call with objects among its arguments or results."""

    def holding(self, index: int) -> contextlib.AbstractContextManager[list[str]]:
        """Inside the block, put one member's weights into the model."""

    def member_key(self, index: int) -> tuple[int | str, ...]:
        """Return the key of one member's random numbers."""

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Return the generator of one member's random numbers."""

    def warn(self, message: str) -> None:
        """Issue a warning, once."""
