"""The part of the ``torch.optim.Optimizer`` interface that trainers implement themselves."""

from __future__ import annotations

from typing import Any

from .._utils import validation


class OptimizerInterface:
    """Mixin for an optimizer without gradients, with an ``lr`` and a ``sigma`` in each parameter group."""

    param_groups: list[dict[str, Any]]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group; setting it sets all groups."""
        return float(self.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.param_groups:
            group["lr"] = validation.check_real("learning_rate", value, positive=False)

    @property
    def sigma(self) -> float:
        """Standard deviation of the perturbations in the first parameter group; setting it sets all groups."""
        return float(self.param_groups[0]["sigma"])

    @sigma.setter
    def sigma(self, value: float) -> None:
        for group in self.param_groups:
            group["sigma"] = validation.check_real("sigma", value, positive=True)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Do nothing: there are no gradients. Present for compatibility with optimizers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: parameter groups are given at construction.

        Raises:
            RuntimeError: Always, once the trainer is constructed.
        """
        if getattr(self, "_constructed", False):
            raise RuntimeError("parameter groups are given at construction; make a new trainer to add one")
        super().add_param_group(param_group)  # type: ignore[misc]
