"""What a number of environment steps buys: generations, and whether compiled code pays."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import gymnasium

from .settings import Settings

# Forwards of the policy, one for each step of all members together, from which compiling it pays: that takes 10 to 20
# seconds and spares about a millisecond each time.
_FORWARDS_THAT_PAY = 20_000

# Fewer generations than this rarely learn anything.
_FEW = 20


def generations(settings: Settings) -> int | None:
    """Return how many generations a run has at least, or None if its episodes have no limit.

    It has more where episodes end before their limit.
    """
    limit = settings.max_steps or episode_limit_of(settings.env)
    if limit is None:
        return None
    return -(-settings.steps // (settings.population_size * settings.episodes * limit))


def episode_limit_of(env: str) -> int | None:
    """Return the steps after which an environment ends an episode, if it is known and does."""
    try:
        return gymnasium.spec(env).max_episode_steps
    except gymnasium.error.Error:
        return None


def described(settings: Settings) -> str:
    """Return what a user is told of the budget when a run begins.

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
        return f"{text}, more where episodes end early"
    return f"{text}: too few to learn much; raise --steps or lower --population-size"


def with_compile(settings: Settings, folder: Path) -> Settings:
    """Return settings by which the policy is compiled only where that pays, or as before in a run that goes on."""
    pays = settings.steps >= _FORWARDS_THAT_PAY * settings.population_size
    if settings.resume:
        # What is wrong with the folder is said by those who open it.
        with contextlib.suppress(OSError, ValueError, KeyError):
            pays = bool(json.loads((folder / "config.json").read_text())["compile"])
    return dataclasses.replace(settings, compile=settings.compile and pays)


def _always_full(env: str) -> bool:
    # The one classic task whose episodes cannot end before their limit.
    return env.split("/")[-1].startswith("Pendulum-")
