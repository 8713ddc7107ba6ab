"""The fitness of policies: their returns in episodes of an environment, for a whole population in lockstep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import Population, batched
from ..noise.keys import derive_seed, forked_rng
from .base import Simulator
from .lockstep import Lockstep, Members
from .normalization import ObservationNormalizer, Statistics
from .observations import keeps_shape
from .simulators import make_simulator


class EpisodeReturn:
    """Fitness function: the mean return of a member over episodes. All members step together.

    Environments are not reset after an episode (unlike with autoreset in Gymnasium's vector environments), and no
    reward after its end counts. Episode seeds depend on the run's seed, the generation and the member. Members that
    share their noise, such as an antithetic pair, play the same episodes.

    Observations are flattened as by ``gymnasium.spaces.flatten``. A model with the attribute ``flatten_observations =
    False``, such as a convolutional network, gets observations of a ``Box`` in their own shape, ``[n, *shape]``.

    If an observation, a reward or an action is not finite, the episode ends. The member's return is then NaN, which
    counts as the worst of the generation.

    Args:
        env: Id of a Gymnasium environment, or a function that makes one.
        episodes: Number of episodes of each member.
        max_steps: Steps after which an episode is cut off, in addition to the environment's own limit. Or a function
            that takes the number of environment steps so far and returns this limit, for episodes that grow.
        share: Number of consecutive members that play the same episodes: the trainer's ``noise_reuse``.
        survival_bonus: Whether the reward for staying alive counts.
        threads: Threads of the simulator; as many as torch has if None. During episodes, torch itself uses one thread,
            as its products are small.
        env_options: Keyword arguments of the environment.

    Attributes:
        steps: Environment steps of all members in completed generations.
        on_steps: Called with a number of steps once this process has taken them, such as the ``update`` of a progress
            bar; or None.
        noisy: Whether the best member of a generation plays other episodes before it counts as the best of the run, as
            its return may be luck. This takes one or two episodes of one environment.

    Raises:
        TypeError: The environment has observations that cannot be flattened, or actions of another kind than ``Box``,
            ``Discrete``, ``MultiDiscrete`` and ``MultiBinary``.
        ValueError: The environment does not exist or collects running statistics in a wrapper, or the model's outputs
            do not fit its actions.
        RuntimeError: It cannot be made, for example because a package is missing.

    Example:
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> from eggroll_trainer.rl.policies import MLPPolicy
        >>> episodes = EpisodeReturn("CartPole-v1", max_steps=20)
        >>> policy = MLPPolicy(*episodes.spaces(), hidden=(8,))
        >>> trainer = EGGROLLTrainer(model=policy, fitness_fn=episodes, population_size=8, noise_reuse=2, seed=0)
        >>> trainer.step()["best_fitness"] <= 20
        True
        >>> episodes.evaluate(policy, episodes=3, seed=0).shape
        (3,)
    """

    def __init__(
        self,
        env: str | Callable[[], Any],
        *,
        episodes: int = 1,
        max_steps: int | Callable[[int], int] | None = None,
        share: int = 2,
        survival_bonus: bool = True,
        threads: int | None = None,
        **env_options: Any,
    ) -> None:
        self.env, self.env_options = env, env_options
        self.episodes, self.max_steps, self.share = episodes, max_steps, max(1, share)
        self.survival_bonus, self.threads = survival_bonus, threads
        self.steps = 0
        self.noisy = True
        self.on_steps: Callable[[int], object] | None = None
        self._simulators: dict[int, Simulator] = {}
        self._statistics = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._warned = False
        # Mark this object as a fitness function for populations.
        batched(self)
        # Raise errors about the environment here, not in the first generation.
        self._simulator(1)

    def __call__(self, population: Population) -> Tensor:
        """Return the mean return of every member, ``[N]``."""
        normalizer = find_normalizer(population.model)
        seeds = [
            derive_seed("episode", population.seed, population.generation, member // self.share, episode) % 2**31
            for member in population.members
            for episode in range(self.episodes)
        ]
        limit = self.max_steps(self.steps) if callable(self.max_steps) else self.max_steps
        state = None
        if hasattr(population.model, "initial_state"):
            initial = population.model.initial_state(self.episodes)  # type: ignore[operator]
            state = initial.expand(len(population), *initial.shape).contiguous()

        seen = None if normalizer is None else Statistics(normalizer.mean.cpu().numpy())
        with population.repeated() as each:

            def forward(members: Members, x: Tensor, *state: Tensor) -> Any:
                return each(x.view(len(members), self.episodes, *x.shape[1:]), *state, members=members)

            rollout = self._rollout(population.model, len(seeds), forward, state, self.episodes)
            returns, steps = rollout.play(seeds, limit, bonus=self.survival_bonus, seen=seen, on_steps=self.on_steps)
        self._warn(rollout.trouble)
        observed = torch.zeros(0, dtype=torch.float64, device="cpu") if seen is None else seen.as_tensor()
        self._statistics = torch.cat([torch.tensor([float(steps)], dtype=torch.float64, device="cpu"), observed])
        return torch.from_numpy(returns).view(len(population), self.episodes).mean(1)

    def evaluate(self, policy: nn.Module, episodes: int, seed: int) -> np.ndarray[Any, Any]:
        """Return the returns of one policy in ``episodes`` episodes, with the survival bonus, ``[episodes]``.

        The return of an episode is NaN if something in it was not finite.

        Args:
            policy: The policy.
            episodes: Number of episodes.
            seed: Seed of the episodes, which differ from those of training, and of the actions that the policy draws.
        """
        seeds = [derive_seed("evaluation", seed, episode) % 2**31 for episode in range(episodes)]
        state = policy.initial_state(episodes) if hasattr(policy, "initial_state") else None  # type: ignore[operator]

        def forward(_: Members, *inputs: Tensor) -> Any:
            return policy(*inputs)

        # As the episodes of a single member, so that all stay in the forward until the end.
        rollout = self._rollout(policy, episodes, forward, state, episodes)
        with torch.no_grad(), forked_rng("evaluation", seed, device=_device_of(policy)):
            returns, _ = rollout.play(seeds, None, bonus=True)
        self._warn(rollout.trouble)
        return returns

    def pop_statistics(self) -> Tensor:
        """Return the steps of the last chunk, and the count, mean and squared deviations of its observations.

        Returns:
            ``[1]``, or ``[2·O + 2]`` if the policy normalises observations.
        """
        statistics, self._statistics = self._statistics, torch.zeros(1, dtype=torch.float64, device="cpu")
        return statistics

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        """Merge the statistics of a generation.

        Args:
            model: The model that is trained.
            statistics: The result of :meth:`pop_statistics` for each chunk, in the order of members.
        """
        self.steps += sum(int(values[0]) for values in statistics)
        normalizer = find_normalizer(model)
        if normalizer is not None:
            normalizer.merge([values[1:] for values in statistics])

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps = state["steps"]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy, which makes its own simulators."""
        return {**self.__dict__, "_simulators": {}, "on_steps": None}

    def spaces(self) -> tuple[Any, Any]:
        """Return the observation and action space of one environment.

        If observations have to be flattened, it is the space of flattened observations, a :class:`.Flattened`.
        """
        simulator = self._simulator(1)
        return simulator.observation_space, simulator.action_space

    def close(self) -> None:
        """Close the environments."""
        for simulator in self._simulators.values():
            simulator.close()
        self._simulators = {}

    def _rollout(
        self, model: nn.Module, count: int, forward: Callable[..., Any], state: Tensor | None, episodes: int
    ) -> Lockstep:
        return Lockstep(
            self._simulator(count),
            forward,
            state,
            episodes,
            device=_device_of(model),
            name=self.env,
            shaped=keeps_shape(model),
        )

    def _warn(self, trouble: str | None) -> None:
        """Warn once about an episode that ended because something was not finite."""
        if trouble is not None and not self._warned:
            self._warned = True
            warnings.warn(f"{trouble}; such an episode ends there, and its return is NaN", RuntimeWarning, stacklevel=3)

    def _simulator(self, count: int) -> Simulator:
        if count not in self._simulators:
            self._simulators[count] = make_simulator(self.env, count, threads=self.threads, **self.env_options)
        return self._simulators[count]


def growing(first: int, last: int, steps: int) -> Callable[[int], int]:
    """Return a ``max_steps`` for episodes that grow exponentially from ``first`` to ``last`` steps.

    Args:
        first: Length at the beginning.
        last: Length at the end.
        steps: Environment steps after which they have the final length.

    Example:
        >>> length = growing(100, 400, steps=1_000_000)
        >>> length(0), length(500_000), length(2_000_000)
        (100, 200, 400)
    """
    return lambda taken: round(first * (last / first) ** min(1.0, taken / steps))


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def find_normalizer(model: nn.Module) -> ObservationNormalizer | None:
    """Return the model's normaliser of observations, or None."""
    return next((module for module in model.modules() if isinstance(module, ObservationNormalizer)), None)
