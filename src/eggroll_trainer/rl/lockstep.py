"""Plays the episodes of all members in lockstep, with one forward per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fitness.turns import one_thread
from .base import Simulator
from .normalization import Statistics
from .policies import finite_actions_of, output_size

Array = np.ndarray[Any, Any]
# Indices of members.
Members = range | tuple[int, ...]

# Members are dropped from the forward when at most one in _SHRINK of them still plays, as a compiled model is compiled
# for each number of members. Below _SMALLEST members, the forward does not get faster.
_SHRINK, _SMALLEST = 4, 16


class Lockstep:
    """Plays one episode in each environment of a simulator, all of them step by step.

    If an observation, reward or action is not finite, the episode ends, and its return becomes NaN.

    When most members' episodes have ended, the forward is made for fewer members. The members of a forward, which
    determine its rounding, depend only on the number of members and the lengths of their episodes.

    Args:
        simulator: The simulator.
        forward: Takes members, their observations ``[n·episodes, O]`` (``[n·episodes, *shape]`` if ``shaped``), and
            their state ``[n, …]`` if there is one. Returns outputs, or outputs and state.
        state: The initial state, ``[N, …]``, or None.
        episodes: Number of episodes of each member, in consecutive environments.
        device: Device of the observations.
        name: Name of the environment in messages.
        shaped: Whether observations keep the shape of their space.

    Attributes:
        trouble: The reason why the first such episode ended, or None.
    """

    def __init__(
        self,
        simulator: Simulator,
        forward: Callable[..., Any],
        state: Tensor | None,
        episodes: int,
        *,
        device: torch.device,
        name: Any,
        shaped: bool = False,
    ) -> None:
        self._simulator, self._forward, self._state = simulator, forward, state
        simulator.strict = False
        self._episodes, self._device, self._name = episodes, device, name
        self._shape = simulator.observation_space.shape if shaped else (-1,)
        self._outputs = output_size(simulator.action_space)
        self.trouble: str | None = None
        self._members: Members = range(simulator.count // episodes)

    def play(
        self,
        seeds: Sequence[int],
        limit: int | None,
        *,
        bonus: bool,
        seen: Statistics | None = None,
        on_steps: Callable[[int], object] | None = None,
    ) -> tuple[Array, int]:
        """Play an episode for each seed; return their returns, and the total number of steps.

        The return of an episode is NaN if something in it was not finite.

        Args:
            seeds: Seeds of the episodes.
            limit: Steps after which an episode is cut off, or None.
            bonus: Whether the survival bonus counts.
            seen: Statistics to which observations are added, or None.
            on_steps: Called after each step with the number of environments that took it, or None.

        Raises:
            ValueError: The policy's outputs do not fit the actions.
        """
        observations = self._simulator.reset(seeds)
        active, returns = np.ones(len(seeds), bool), np.zeros(len(seeds))
        self._lose(self._simulator.not_finite, active, returns)
        time = steps = 0
        with one_thread():
            playing = int(np.count_nonzero(active))
            while playing and (limit is None or time < limit):
                rows = observations.reshape(len(seeds), -1)
                if seen is not None:
                    seen.add(rows if playing == len(seeds) else rows[active])
                actions, bad = self._act(rows, active)
                if bad:
                    self._lose(bad, active, returns)
                    playing = int(np.count_nonzero(active))
                observations, rewards, terminated, truncated, survival = self._simulator.step(actions, active)
                # Rows that are not active are zero.
                returns += rewards if bonus else rewards - survival
                time, steps = time + 1, steps + playing
                if on_steps is not None:
                    on_steps(playing)
                ended: Array = np.logical_or(terminated, truncated)
                if self._simulator.not_finite or bad or ended.any():
                    active &= ~ended
                    self._lose(self._simulator.not_finite, active, returns)
                    playing = int(np.count_nonzero(active))
                    self._shrink(active)
        return returns, steps

    def _lose(self, bad: dict[int, str], active: Array, returns: Array) -> None:
        """End the episodes in which something is not finite, given a message for each."""
        for index, message in bad.items():
            active[index], returns[index] = False, np.nan
            self.trouble = self.trouble or message

    def _act(self, observations: Array, active: Array) -> tuple[Array, dict[int, str]]:
        """Return actions for all environments, zero for those without a forward, and messages for bad actions."""
        everybody = isinstance(self._members, range)
        selected = observations if everybody else observations[self._rows]
        x = torch.from_numpy(selected.reshape(len(selected), *self._shape)).float().to(self._device)
        result = (
            self._forward(self._members, x) if self._state is None else self._forward(self._members, x, self._state)
        )
        outputs, self._state = result if isinstance(result, tuple) else (result, None)
        checked = self._checked(outputs, len(x))
        actions, fine = finite_actions_of(checked, self._simulator.action_space)
        bad = {}
        if not fine.all():
            rows = np.arange(len(observations)) if everybody else self._rows
            bad = {
                int(rows[i]): f"{self._name}: the policy gave outputs that are not valid actions, {checked[i]}"
                for i in np.flatnonzero(~fine)
                if active[rows[i]]
            }
        if everybody:
            return actions, bad
        padded = np.zeros((len(observations), *actions.shape[1:]), actions.dtype)
        padded[self._rows] = actions
        return padded, bad

    def _shrink(self, active: Array) -> None:
        """If few members still play, continue with fewer members, which include these."""
        size = len(self._members) // _SHRINK
        if size < _SMALLEST or np.count_nonzero(active) > size * self._episodes:
            return
        live: Array = np.any(active.reshape(-1, self._episodes), axis=1)
        if np.count_nonzero(live) > size:
            return
        members = np.asarray(self._members)
        # Filled up with members whose episodes have ended, so that there are few different sizes.
        chosen = np.sort(np.argsort(~live[members], kind="stable")[:size])
        self._members = tuple(members[chosen].tolist())
        self._rows = (members[chosen, None] * self._episodes + np.arange(self._episodes)).ravel()
        if self._state is not None:
            self._state = self._state[torch.from_numpy(chosen).to(self._device)]

    def _checked(self, outputs: Any, count: int) -> Array:
        expected = self._outputs
        if not isinstance(outputs, Tensor) or outputs.numel() != count * expected or outputs.shape[-1] != expected:
            got = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"the policy must return {expected} outputs for each observation, as {self._name} has the action space"
                f" {self._simulator.action_space}; for {count} observations it returned {got}"
            )
        return outputs.reshape(count, expected).float().cpu().numpy()
