"""Makes a trainer from the settings of a command, such as ``eggroll train``."""

from __future__ import annotations

from typing import Any

import torch

from .eggroll import EGGROLLTrainer
from .keyed import KeyedESTrainer
from .vanilla import VanillaESTrainer

_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
# Fields of every command's settings that have the names of the trainer's arguments.
_SAME = ("population_size", "learning_rate", "sigma", "shaping", "seed", "chunk_size", "engine")


def trainer_from(settings: Any, **options: Any) -> KeyedESTrainer:
    """Return the trainer that settings describe.

    Args:
        settings: The settings of a command. It has the trainer's arguments, ``antithetic``, the name of an
            ``optimizer``, and ``rank``, 0 for full rank.
        options: Further arguments of the trainer. They override the settings.
    """
    given: dict[str, Any] = {
        **{name: getattr(settings, name) for name in _SAME},
        "noise_reuse": 2 if settings.antithetic else 0,
        "optimizer": _OPTIMIZERS[settings.optimizer],
        **options,
    }
    return VanillaESTrainer(**given) if settings.rank == 0 else EGGROLLTrainer(rank=settings.rank, **given)
