"""Which optimizers can take the step: those that move weights from one dense gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise.keys import kept_rng

OptimizerFactory = Callable[..., torch.optim.Optimizer]

# Up to this many weights, copies of all parameters cost little.
_SMALL = 2**22


@torch.inference_mode(False)
def check_optimizer(factory: OptimizerFactory, groups: Sequence[dict[str, Any]]) -> None:
    """Check that the factory's optimizer can step from a dense gradient, on stand-ins for the parameters.

    The stand-ins of a large model are smaller than its parameters.

    Raises:
        ValueError: The optimizer's step fails, for example because it needs a closure or sparse gradients.
    """
    small = sum(p.numel() for group in groups for p in group["params"]) <= _SMALL

    def stand_in(p: Tensor) -> Tensor:
        return torch.nn.Parameter(p.new_zeros(p.shape if small else [min(size, 2) for size in p.shape]))

    stand_ins = [{**group, "params": [stand_in(p) for p in group["params"]]} for group in groups]
    parameters = [p for group in stand_ins for p in group["params"]]
    with torch.no_grad(), kept_rng({p.device for p in parameters}):
        try:
            optimizer = factory(stand_ins, lr=groups[0]["lr"])
            step = optimizer.step
        except Exception:
            # The error is raised again when the optimizer of the real parameters is made.
            return
        for p in parameters:
            p.grad = torch.ones_like(p)
        try:
            step()
        except Exception as error:
            raise ValueError(
                f"optimizer {type(optimizer).__name__} cannot take the steps of a trainer, which has a dense gradient"
                f" and no loss to evaluate again ({type(error).__name__}: {error}). Use another one, such as"
                " torch.optim.SGD, Adam or AdamW"
            ) from error
