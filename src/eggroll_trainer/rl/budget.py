"""Estimates from the number of environment steps: generations, and whether compiled code pays off."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import gymnasium

from .settings import Settings

# Number of forwards of the policy from which on compiling pays off. There is one forward for each step of all members
# together. Compiling takes 10 to 20 seconds, and saves about a millisecond per forward.
_FORWARDS_THAT_PAY = 20_000

# With fewer generations, a policy rarely learns anything.
_FEW = 20


def generations(settings: Settings) -> int | None:
    """Return the smallest number of generations of a run, or None if its episodes have no limit.

    There are more if episodes end before their limit.
    """
    limit = settings.max_steps or episode_limit_of(settings.env)
    if limit is None:
        return None
    return -(-settings.steps // (settings.population_size * settings.episodes * limit))


def episode_limit_of(env: str) -> int | None:
    """Return the step limit of an environment's episodes, or None if it is unknown or has none."""
    try:
        return gymnasium.spec(env).max_episode_steps
    except gymnasium.error.Error:
        return None


def described(settings: Settings) -> str:
    """Return the message about the budget at the beginning of a run.

    Example:
        >>> described(Settings("Pendulum-v1", steps=100_000, population_size=64))
        '100,000 steps are 8 generations of 64 members: too few to learn much; raise --steps or lower --population-size'
    """
    members = f"generations of {settings.population_size} members"
    count = generations(settings)
    if count is None:
        return f"{settings.steps:,} steps, in {members}"
    early = "" if _always_full(settings.env) else "at least "
    text = f"{settings.steps:,} steps are {early}{count} {members}"
    if count >= _FEW:
        return text
    if early:
        return f"{text}, and more if episodes end early"
    return f"{text}: too few to learn much; raise --steps or lower --population-size"


def with_compile(settings: Settings, folder: Path) -> Settings:
    """Return the settings with ``compile`` set to whether it pays off; for a resumed run, to its earlier value."""
    pays = settings.steps >= _FORWARDS_THAT_PAY * settings.population_size
    if settings.resume:
        # Problems with the folder raise an error when it is opened.
        with contextlib.suppress(OSError, ValueError, KeyError):
            pays = bool(json.loads((folder / "config.json").read_text())["compile"])
    return dataclasses.replace(settings, compile=settings.compile and pays)


def _always_full(env: str) -> bool:
    # The only classic task whose episodes cannot end before their limit.
    return env.split("/")[-1].startswith("Pendulum-")
