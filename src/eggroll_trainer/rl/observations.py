"""Observations as policies see them: flattened like in Gymnasium or, on request, in their own shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from torch import nn

Array = np.ndarray[Any, Any]


class Flattened(spaces.Box):
    """The ``Box`` for flattened observations of another space.

    Args:
        original: The other space: Discrete, Dict, Tuple, …

    Attributes:
        original: The other space.

    Raises:
        TypeError: Observations of that space cannot be flattened to a ``Box``.
    """

    def __init__(self, original: spaces.Space[Any]) -> None:
        box = spaces.flatten_space(original)
        if not isinstance(box, spaces.Box):
            raise TypeError(
                f"observations of {original} cannot be flattened to a Box; turn them into one with"
                " gymnasium.wrappers.TransformObservation"
            )
        super().__init__(box.low, box.high, dtype=box.dtype.type)
        self.original = original


def original_of(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return the environment's own space, for a space that may be flattened."""
    return space.original if isinstance(space, Flattened) else space


def observation_size(space: spaces.Space[Any]) -> int:
    """Return the number of entries of a flattened observation, or raise ``TypeError`` if its size is not fixed."""
    if not space.is_np_flattenable:
        raise TypeError(
            f"observations of {space} have no fixed size; turn them into a Box with"
            " gymnasium.wrappers.TransformObservation"
        )
    return spaces.flatdim(space)


def keeps_shape(policy: nn.Module) -> bool:
    """Return whether a policy takes observations in their own shape: its ``flatten_observations`` is False."""
    return getattr(policy, "flatten_observations", True) is False


def as_input(observation: Any, space: spaces.Space[Any] | None, *, shaped: bool) -> Array:
    """Return one observation as a policy sees it in training, ``[1, O]``, or ``[1, *shape]``.

    Args:
        observation: The observation of the environment, or a flattened one.
        space: Its space; if None, it must be an array.
        shaped: Whether arrays keep their shape.

    Raises:
        TypeError: It is not an array, and ``space`` is None.
        ValueError: It does not belong to ``space``.
    """
    space = None if space is None else original_of(space)
    if space is None or isinstance(space, spaces.Box):
        if space is None and isinstance(observation, (int, np.integer)) or isinstance(observation, (Mapping, str)):
            raise TypeError(
                f"the observation {observation!r} is not an array, but it was converted to one in training: pass"
                " observation_space=env.observation_space to Agent"
            )
        values = np.asarray(observation)
        if space is not None and values.size != np.prod(space.shape):
            raise ValueError(f"an observation of {space} was expected, got one of shape {values.shape}")
        shape = values.shape if space is None else space.shape
        return values.reshape(1, *shape) if shaped else values.reshape(1, -1)
    flat = (observation_size(space),)
    if isinstance(observation, np.ndarray) and observation.shape == flat != space.shape:
        return observation[None]
    try:
        if isinstance(space, spaces.Discrete) and not space.contains(observation):
            raise ValueError(f"it must be from {space.start} to {space.start + space.n - 1}")
        return np.asarray(spaces.flatten(space, observation))[None]
    except Exception as error:
        raise ValueError(f"an observation of {space} was expected, got {observation!r}: {error}") from error
