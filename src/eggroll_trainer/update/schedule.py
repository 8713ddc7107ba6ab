"""Schedules of the learning rate and of sigma: the schedulers of ``torch.optim.lr_scheduler`` drive both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

LRSchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


class SigmaSchedule:
    """Lets a learning-rate scheduler drive the ``sigma`` of a trainer's groups.

    Args:
        groups: The trainer's parameter groups; their ``sigma`` is set.
        factory: Makes the scheduler from an optimizer whose learning rates stand for the sigmas, such as
            ``functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.99)``.
    """

    def __init__(self, groups: list[dict[str, Any]], factory: LRSchedulerFactory) -> None:
        self._groups = groups
        self._stand_in = torch.optim.SGD([{"params": [torch.zeros(())], "lr": group["sigma"]} for group in groups])
        self.scheduler = make_scheduler("sigma_scheduler", factory, self._stand_in)
        self._write()

    def step(self) -> None:
        """Go on by one generation."""
        # A scheduler expects its optimizer to have stepped; this one has no gradients and does nothing.
        self._stand_in.step()
        self.scheduler.step()
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return {
            "scheduler": self.scheduler.state_dict(),
            "values": [g["lr"] for g in self._stand_in.param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.scheduler.load_state_dict(state["scheduler"])
        for group, value in zip(self._stand_in.param_groups, state["values"], strict=True):
            group["lr"] = value
        self._write()

    def _write(self) -> None:
        for group, stand_in in zip(self._groups, self._stand_in.param_groups, strict=True):
            group["sigma"] = stand_in["lr"]


def make_scheduler(name: str, factory: LRSchedulerFactory, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return ``factory(optimizer)``.

    Raises:
        TypeError: It is not a scheduler.
    """
    scheduler = factory(optimizer) if callable(factory) else factory
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"{name} must make a torch.optim.lr_scheduler from an optimizer, such as"
            f" functools.partial(CosineAnnealingLR, T_max=300); got {type(scheduler).__name__}"
        )
    return scheduler
