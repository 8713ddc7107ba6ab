"""The trainer that the settings of a command describe."""

from __future__ import annotations

from typing import Any

import torch

from .eggroll import EGGROLLTrainer
from .keyed import KeyedESTrainer
from .vanilla import VanillaESTrainer

_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
# What the settings of every command have under the trainer's own names.
_SAME = ("population_size", "learning_rate", "sigma", "shaping", "seed", "chunk_size", "engine")


def trainer_from(settings: Any, **options: Any) -> KeyedESTrainer:
    """Return the trainer that settings describe.

    Args:
        settings: With the fields of a command: those of a trainer, ``antithetic``, the name of an ``optimizer``, and
            ``rank``, 0 for full rank.
        options: Further arguments of the trainer, or others than the settings say.
    """
    given: dict[str, Any] = {
        **{name: getattr(settings, name) for name in _SAME},
        "noise_reuse": 2 if settings.antithetic else 0,
        "optimizer": _OPTIMIZERS[settings.optimizer],
        **options,
    }
    return VanillaESTrainer(**given) if settings.rank == 0 else EGGROLLTrainer(rank=settings.rank, **given)
