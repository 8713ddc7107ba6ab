"""The settings of a generation: everything that its results depend on, besides weights, model and fitness function.

Processes that share a generation compare them, callbacks change them, and score logs and checkpoints store them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.copies import plain_copy
from ..fitness.shaping import SHAPERS, shaper_name


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a generation's results depend on.

    Attributes:
        trainer: Class name of the trainer.
        optimizer: Class name of the optimizer that takes the step.
        optimizer_options: Its options, such as betas and weight decay, as text; one entry for each group.
        lr_scheduler: Class name of the scheduler from ``lr_scheduler=``.
        sigma_scheduler: Class name of the scheduler from ``sigma_scheduler=``.
        population_size: ``N``.
        chunk_size: Number of members evaluated at a time.
        coalesce: Whether members may be evaluated together.
        compile: Whether forwards are compiled.
        evaluation_dtype: Dtype of autocast during evaluation.
        device: Type of the device.
        dtypes: Dtypes of the parameters.
        seed: Seed of the run.
        options: Options of the parameter groups: learning rate, sigma, rank, and values that schedulers store there.
        frozen: Names of the given parameters with ``requires_grad=False``: neither perturbed nor updated.
        noise_reuse: Number of members that share a noise draw.
        group_size: Number of members whose scores are shaped together; 0 for all.
        noise: Distribution of the factors.
        shaping: Name of the shaper.
        freeze_nonlora: Whether only matrices are trained.
        maximize: Whether higher scores are better.
        auto: Names of the settings that are ``"auto"``, as text.
        max_grad_norm: Largest norm of the estimate, or None.
    """

    trainer: str
    optimizer: str
    optimizer_options: list[str]
    lr_scheduler: str
    sigma_scheduler: str
    population_size: int
    chunk_size: int
    coalesce: bool | str
    compile: bool
    evaluation_dtype: str
    device: str
    dtypes: list[str]
    seed: int
    options: list[dict[str, Any]]
    frozen: list[str]
    noise_reuse: int = 0
    group_size: int = 0
    noise: str = ""
    shaping: str = ""
    freeze_nonlora: bool = False
    maximize: bool = True
    auto: str = ""
    max_grad_norm: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return the settings by name, as a dictionary of numbers, strings, lists and dictionaries: the plain form."""
        return plain_copy({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


# Defaults for settings that files of earlier versions lack.
_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(Settings) if field.default is not dataclasses.MISSING
}


# Settings that cannot change after construction.
FIXED = (
    *("trainer", "optimizer", "optimizer_options", "lr_scheduler", "sigma_scheduler"),
    *("device", "dtypes", "freeze_nonlora", "maximize", "auto"),
)  # fmt: skip


# Settings that are attributes of the trainer with the same name and type.
_ATTRIBUTES = ("population_size", "coalesce", "compile", "noise_reuse", "group_size", "noise", "max_grad_norm")


def differences(now: Mapping[str, Any], then: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, str]:
    """Return descriptions of the settings that differ between two sets in plain form, by name."""
    return {
        name: f"{name}={value!r} (was {then.get(name, _DEFAULTS.get(name))!r})"
        for name, value in now.items()
        if name not in ignored and value != then.get(name, _DEFAULTS.get(name))
    }


def adopt(trainer: Any, settings: Mapping[str, Any]) -> None:
    """Give a trainer the settings that may change between generations.

    They are checked when its next generation begins.

    Args:
        trainer: The trainer.
        settings: Some or all settings in plain form. ``shaping`` may be a shaper instead of its name.

    Raises:
        ValueError: ``shaping`` is the name of a user-defined function that the trainer does not have.
    """
    if settings.get("seed", trainer.seed) != trainer.seed:
        trainer.seed = settings["seed"]
    for name in _ATTRIBUTES:
        if name in settings and hasattr(trainer, name):
            setattr(trainer, name, settings[name])
    if "evaluation_dtype" in settings:
        trainer.evaluation_dtype = getattr(torch, settings["evaluation_dtype"].removeprefix("torch."), None)
    if "shaping" in settings and hasattr(trainer, "shaping"):
        _adopt_shaping(trainer, settings["shaping"])
    if "options" in settings:
        for group, options in zip(trainer.param_groups, settings["options"], strict=True):
            group.update(plain_copy(options))
    if "frozen" in settings:
        trainer.set_frozen(settings["frozen"])
    # At the end, as the automatic chunk size depends on other settings. If it is the same, it stays automatic.
    if settings.get("chunk_size", trainer.settings().chunk_size) != trainer.settings().chunk_size:
        trainer.chunk_size = settings["chunk_size"]


@contextlib.contextmanager
def adopted(trainer: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Give a trainer settings, as :func:`adopt` does, and undo that if the block raises."""
    names = (*_ATTRIBUTES, "shaping", "chunk_size", "evaluation_dtype", "seed")
    before = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    record = trainer.settings()
    try:
        adopt(trainer, settings)
        yield
    except BaseException:
        adopt(trainer, {"options": record.options, "frozen": record.frozen})
        for name, value in before.items():
            setattr(trainer, name, value)
        raise


def to_send(trainer: Any, before: Settings) -> dict[str, Any]:
    """Return a trainer's settings to send to other processes, which still have the settings ``before``.

    Raises:
        TypeError: The shaper has changed to one that other processes cannot import.
    """
    now = trainer.settings()
    values = now.plain()
    if now.shaping != before.shaping and now.shaping not in SHAPERS:
        try:
            pickle.dumps(trainer.shaping)
        except Exception as error:
            raise TypeError(
                f"shaping was set to {now.shaping}, which cannot be sent to the other processes ({error}); use a name,"
                " or a function defined at the top of a module"
            ) from error
        values["shaping"] = trainer.shaping
    return values


def _adopt_shaping(trainer: Any, shaping: Any) -> None:
    if callable(shaping) or shaping in SHAPERS:
        trainer.shaping = shaping
    elif shaper_name(trainer.shaping) != shaping:
        raise ValueError(
            f"the generation was shaped by {shaping} and the trainer's shaping is {shaper_name(trainer.shaping)}: set"
            " trainer.shaping to the function that was used, and go on"
        )


class Generation(NamedTuple):
    """The data that is needed to repeat the step of a generation.

    Attributes:
        number: Number of the generation, counted from 1.
        settings: The settings that it depends on, in plain form.
        scores: ``[N]`` or ``[N, K]`` in float64, as returned by the fitness function.
        statistics: Statistics that a learner has collected from each chunk.
        again: Fitness of the best member when evaluated again; NaN if that was skipped, None if there was no need.
    """

    number: int
    settings: dict[str, Any]
    scores: Tensor
    statistics: list[Tensor]
    again: float | None = None
