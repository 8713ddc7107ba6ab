"""Collects from a trainer the settings that the results of a generation depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return the values of :class:`~eggroll_trainer.checkpoints.generation.Settings` that all trainers have."""
    return {
        "trainer": type(trainer).__name__,
        "optimizer": type(trainer._centre.optimizer).__name__,
        "optimizer_options": trainer._centre.optimizer_options(),
        "lr_scheduler": type(trainer._schedules.lr_scheduler).__name__,
        "sigma_scheduler": type(trainer._schedules.sigma_scheduler).__name__,
        "population_size": trainer.population_size,
        "chunk_size": min(trainer.population_size, trainer._evaluator.chunk_members()),
        "coalesce": trainer.coalesce,
        "compile": trainer.compile,
        "evaluation_dtype": str(trainer.evaluation_dtype),
        "device": trainer.device.type,
        "dtypes": sorted({str(p.dtype) for p in trainer._centre.candidates.values()}),
        "seed": trainer.seed,
        "options": trainer._options(),
        "maximize": trainer.maximize,
        "frozen": [name for name, p in trainer._centre.candidates.items() if not p.requires_grad],
    }


def settings_of_members(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the settings, in plain form, that the members of a generation depend on."""
    kept = {key: settings[key] for key in ("population_size", "seed", "frozen", "noise_reuse", "noise")}
    of_the_step = ("lr", "anchor_decay")
    options = [{key: value for key, value in group.items() if key not in of_the_step} for group in settings["options"]]
    return {**kept, "options": options}
