"""Schedules of the learning rate and of sigma, both with the schedulers of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .._utils.copies import plain_copy

LRSchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


class Schedules:
    """Schedulers of the learning rates and sigmas of a trainer's parameter groups, stepped every generation.

    Args:
        trainer: The optimizer whose groups have an ``lr`` and a ``sigma``.
        lr_scheduler: Makes a scheduler from the trainer, or None.
        sigma_scheduler: Makes a scheduler from an optimizer whose learning rates stand for the sigmas, or None.

    Attributes:
        lr_scheduler: The scheduler of the learning rate, or None.
        sigma_scheduler: The scheduler of sigma, or None.
    """

    def __init__(
        self,
        trainer: torch.optim.Optimizer,
        lr_scheduler: LRSchedulerFactory | None,
        sigma_scheduler: LRSchedulerFactory | None,
    ) -> None:
        self._groups = trainer.param_groups
        mode = "max" if getattr(trainer, "maximize", True) else "min"
        self.lr_scheduler = (
            None if lr_scheduler is None else make_scheduler("lr_scheduler", lr_scheduler, trainer, mode)
        )
        self.sigma_scheduler: LRScheduler | None = None
        if sigma_scheduler is not None:
            stand_ins = [{"params": [torch.zeros((), device="cpu")], "lr": group["sigma"]} for group in self._groups]
            self._stand_in = torch.optim.SGD(stand_ins)
            self.sigma_scheduler = make_scheduler("sigma_scheduler", sigma_scheduler, self._stand_in, mode)
            self._write_sigmas()

    @contextlib.contextmanager
    def stepped(self, fitness: float) -> Iterator[None]:
        """Step the schedulers after a generation of mean fitness ``fitness``; undo it if anything raises."""
        before = plain_copy(self.state_dict())
        try:
            if self.lr_scheduler is not None:
                advance(self.lr_scheduler, fitness)
            if self.sigma_scheduler is not None:
                # The user may have changed the sigmas of the groups.
                for group, stand_in in zip(self._groups, self._stand_in.param_groups, strict=True):
                    stand_in["lr"] = group["sigma"]
                # Schedulers warn unless their optimizer has stepped. Without gradients, the step does nothing.
                self._stand_in.step()
                advance(self.sigma_scheduler, fitness)
                self._write_sigmas()
            yield
        except BaseException:
            self.load_state_dict(before)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the groups and the schedulers' states, not copied."""
        return {
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self._groups],
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "sigma_scheduler": None
            if self.sigma_scheduler is None
            else [self.sigma_scheduler.state_dict(), self._stand_in.state_dict()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a copy of what :meth:`state_dict` returned."""
        state = plain_copy(state)
        for group, options in zip(self._groups, state["param_groups"], strict=True):
            group.update(options)
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.sigma_scheduler is not None:
            scheduler, stand_in = state["sigma_scheduler"]
            self.sigma_scheduler.load_state_dict(scheduler)
            self._stand_in.load_state_dict(stand_in)

    def _write_sigmas(self) -> None:
        for group, stand_in in zip(self._groups, self._stand_in.param_groups, strict=True):
            group["sigma"] = stand_in["lr"]


def make_scheduler(
    name: str, factory: LRSchedulerFactory, optimizer: torch.optim.Optimizer, mode: str = "max"
) -> LRScheduler:
    """Return the scheduler that a factory makes for an optimizer.

    Args:
        name: Name of the argument, for messages.
        factory: Makes the scheduler.
        optimizer: The optimizer.
        mode: ``"max"`` if the mean fitness is to rise, ``"min"`` if it is to fall.

    Raises:
        TypeError: The factory does not make a scheduler.
        ValueError: The scheduler is for another optimizer, cycles a momentum, or is a ``ReduceLROnPlateau`` with the
            other mode.
    """
    try:
        scheduler = factory(optimizer) if callable(factory) else None
    except (ValueError, KeyError) as error:
        if "momentum" not in str(error):
            raise
        raise ValueError(
            f"{name} cycles a momentum, which a trainer does not have: make it with cycle_momentum=False, such as"
            " functools.partial(OneCycleLR, max_lr=0.1, total_steps=300, cycle_momentum=False)"
            f" (torch says: {error})"
        ) from error
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"{name} must make a torch.optim.lr_scheduler from an optimizer, such as"
            f" functools.partial(CosineAnnealingLR, T_max=300); got {type(factory).__name__} {factory!r}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(f"{name} must make its scheduler for the optimizer that it is given, not for another one")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode:
        course = "rises" if mode == "max" else "falls"
        raise ValueError(f"{name}: ReduceLROnPlateau gets the mean fitness, which {course}; make it with mode={mode!r}")
    return scheduler


def advance(scheduler: LRScheduler, fitness: float) -> None:
    """Step a scheduler at the end of a generation; one that reduces on plateaus gets the mean fitness."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(fitness)
    else:
        scheduler.step()
