"""Policies: modules that map observations to actions, and normalise observations themselves."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from .._utils.validation import check_int
from .normalization import ObservationNormalizer
from .observations import as_input, keeps_shape, observation_size, original_of


class Policy(nn.Module):
    """Base class of policies: flattens and normalises observations, and turns outputs into actions.

    For a continuous action space, the outputs are the action, in units in which its bounds are ±1. For a discrete one,
    they are a logit for each action (``MultiDiscrete``: for each action of each component; ``MultiBinary``: for each
    bit, which is set if it is above 0). With ``sample=True``, actions are drawn at random: around the output, with a
    learnt standard deviation, or according to the logits.

    Args:
        observation_space: Observation space of one environment, flattened or not.
        action_space: Action space of one environment: ``Box``, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``.
        normalize: Whether to normalise observations with running statistics.
        sample: Whether to draw actions at random, with torch's global generator.
        observed: Number of leading entries of an observation that the policy sees; all if None.

    Raises:
        TypeError: A space is of another kind, or ``observed`` is not an integer.
        ValueError: Observations have fewer entries than ``observed``.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        normalize: bool = True,
        sample: bool = False,
        observed: int | None = None,
    ) -> None:
        super().__init__()
        size, self.outputs = observation_size(observation_space), output_size(action_space)
        self.inputs = size if observed is None else check_int("observed", observed, 1)
        if self.inputs > size:
            raise ValueError(f"observed must be at most {size}, the numbers of an observation, got {observed}")
        self.sample, self.size = sample, size
        self.discrete, self.binary = (
            not isinstance(action_space, spaces.Box),
            isinstance(action_space, spaces.MultiBinary),
        )
        # As bytes, which are immutable: populations compare mutable attributes of a model at every call.
        original = original_of(observation_space)
        self._observation_space = None if isinstance(original, spaces.Box) else pickle.dumps(original)
        self.normalizer: nn.Module = ObservationNormalizer(size) if normalize else nn.Identity()
        self.log_deviation = nn.Parameter(torch.full((self.outputs,), -1.0)) if sample and not self.discrete else None

    @property
    def observation_space(self) -> spaces.Space[Any] | None:
        """The environment's observation space, if its observations have to be flattened to an array."""
        return None if self._observation_space is None else pickle.loads(self._observation_space)

    def observe(self, observations: Tensor) -> Tensor:
        """Return the network's inputs ``[..., inputs]`` for observations ``[..., O]``.

        Raises:
            ValueError: Observations have another size than those that the policy was made for.
        """
        if observations.shape[-1] != self.size:
            raise ValueError(f"the policy is for observations of {self.size} numbers, got {observations.shape[-1]}")
        return self.normalizer(observations)[..., : self.inputs]

    def act(self, outputs: Tensor) -> Tensor:
        """Return actions for the network's outputs, ``[..., outputs]``: random ones, or the outputs themselves."""
        if not self.sample:
            return outputs
        if self.log_deviation is not None:
            return outputs + self.log_deviation.exp() * torch.randn_like(outputs)
        uniform = torch.rand_like(outputs).clamp(1e-20)
        if self.binary:
            # A logit plus logistic noise is above 0 with the probability that the logit represents.
            return outputs + uniform.log() - (-uniform).log1p()
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        return outputs - (-uniform.log()).log()


class MLPPolicy(Policy):
    """A multilayer perceptron; without hidden layers, a linear policy.

    Args:
        observation_space: Observation space of one environment.
        action_space: Action space of one environment.
        hidden: Widths of the hidden layers.
        activation: Activation after each hidden layer.
        options: ``normalize``, ``sample`` and ``observed`` of :class:`Policy`.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = MLPPolicy(env.observation_space, env.action_space, hidden=(16,))
        >>> policy(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        hidden: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        **options: Any,
    ) -> None:
        super().__init__(observation_space, action_space, **options)
        sizes = [self.inputs, *hidden]
        layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), activation())]
        self.body = nn.Sequential(*layers, _head(sizes[-1], self.outputs))

    def forward(self, observations: Tensor) -> Tensor:
        """Return actions (or logits) ``[..., A]`` for observations ``[..., O]``."""
        return self.act(self.body(self.observe(observations)))


class LinearPolicy(MLPPolicy):
    """An affine map from observations to actions, as in Mania et al., "Simple random search provides a competitive
    approach to reinforcement learning", 2018.

    Args:
        observation_space: Observation space of one environment.
        action_space: Action space of one environment.
        options: ``normalize``, ``sample`` and ``observed`` of :class:`Policy`.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = LinearPolicy(env.observation_space, env.action_space)
        >>> policy(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """  # noqa: D205

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], **options: Any) -> None:
        super().__init__(observation_space, action_space, hidden=(), **options)


class GRUPolicy(Policy):
    """A gated recurrent unit and an output layer, for tasks in which a single observation is not enough.

    Args:
        observation_space: Observation space of one environment.
        action_space: Action space of one environment.
        hidden: Width of the recurrent state.
        options: ``normalize``, ``sample`` and ``observed`` of :class:`Policy`.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = GRUPolicy(env.observation_space, env.action_space, hidden=8)
        >>> outputs, state = policy(torch.zeros(5, 4), policy.initial_state(5))
        >>> outputs.shape
        torch.Size([5, 2])
    """

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], hidden: int = 32, **options: Any
    ) -> None:
        super().__init__(observation_space, action_space, **options)
        self.hidden = hidden
        self.cell, self.head = nn.GRUCell(self.inputs, hidden), _head(hidden, self.outputs)

    def initial_state(self, count: int) -> Tensor:
        """Return the initial state of ``count`` episodes, ``[count, hidden]``."""
        return torch.zeros(count, self.hidden, device=self.cell.weight_hh.device)

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions (or logits) ``[n, A]`` and the next state, for observations ``[n, O]`` and a state."""
        state = self.cell(self.observe(observations), state)
        return self.act(self.head(state)), state


def output_size(space: spaces.Space[Any]) -> int:
    """Return the number of outputs of a policy for an action space."""
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return int(np.prod(space.shape))
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    raise TypeError(f"actions must be a Box, Discrete, MultiDiscrete or MultiBinary space, got {space}")


def actions_of(outputs: np.ndarray[Any, Any], space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """Return the environments' actions for a policy's outputs ``[n, A]``: scaled and clipped, or by the logits.

    If all actions are bounded, the outputs -1 and 1 stand for the bounds, so that perturbations have the same effect in
    every task.
    """
    if isinstance(space, spaces.Box):
        actions = outputs.reshape(len(outputs), *space.shape)
        low, high = space.low, space.high
        with np.errstate(over="ignore"):
            half = np.subtract(high, low, dtype=np.promote_types(space.dtype, np.float32)) / 2
        # Some environments have the largest representable number as a bound.
        if np.isfinite(half).all():
            actions = low + half + half * actions
        actions = np.clip(actions, low, high)
        return (actions if space.dtype.kind == "f" else np.rint(actions)).astype(space.dtype, copy=False)
    if isinstance(space, spaces.MultiBinary):
        return (outputs > 0).reshape(len(outputs), *space.shape).astype(space.dtype)
    if isinstance(space, spaces.MultiDiscrete):
        ends = np.cumsum(space.nvec.ravel())[:-1]
        chosen = np.stack([logits.argmax(-1) for logits in np.split(outputs, ends, axis=-1)], -1)
        return (chosen.reshape(len(outputs), *space.shape) + space.start).astype(space.dtype)
    assert isinstance(space, spaces.Discrete)
    return outputs.argmax(-1) + space.start


def finite_actions_of(
    outputs: np.ndarray[Any, Any], space: spaces.Space[Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the result of :func:`actions_of`, and whether each action is valid, ``[n]``: finite, from no NaN."""
    fine = ~np.isnan(outputs).any(-1)
    if not fine.all():
        outputs = np.where(fine[:, None], outputs, 0)
    actions = actions_of(outputs, space)
    if actions.dtype.kind == "f":
        fine &= np.isfinite(actions.reshape(len(actions), -1)).all(-1)
    return actions, fine


class Agent:
    """Runs a policy in one ordinary environment: keeps the recurrent state, and turns outputs into actions.

    Args:
        policy: The policy, for example ``trainer.get_best_model()``.
        action_space: Action space of the environment.
        observation_space: Observation space of the environment. It is needed to convert observations that are not
            arrays (Discrete, Dict, Tuple, …), as in training. A :class:`Policy` has stored it; pass it for other
            modules.

    Raises:
        TypeError: An observation is not an array, and its space is not known.
        ValueError: An observation does not belong to its space, or has another size than the policy's.

    Example:
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = MLPPolicy(env.observation_space, env.action_space, hidden=(8,))
        >>> agent = Agent(policy, env.action_space)
        >>> observation, _ = env.reset(seed=0)
        >>> env.action_space.contains(agent(observation))
        True
    """

    def __init__(
        self,
        policy: nn.Module,
        action_space: gymnasium.Space[Any],
        observation_space: gymnasium.Space[Any] | None = None,
    ) -> None:
        self.policy, self.action_space = policy, action_space
        if observation_space is None:
            remembered = getattr(policy, "observation_space", None)
            observation_space = remembered if isinstance(remembered, gymnasium.Space) else None
        self.observation_space = observation_space
        self.shaped = keeps_shape(policy)
        self.reset()

    def reset(self) -> None:
        """Begin a new episode."""
        self.state = self.policy.initial_state(1) if hasattr(self.policy, "initial_state") else None  # type: ignore[operator]

    @torch.no_grad()
    def __call__(self, observation: Any) -> Any:
        """Return the action for an observation."""
        device = next(self.policy.parameters()).device
        values = as_input(observation, self.observation_space, shaped=self.shaped)
        x = torch.as_tensor(values, dtype=torch.float32, device=device)
        if self.state is None:
            outputs = self.policy(x)
        else:
            outputs, self.state = self.policy(x, self.state)
        return actions_of(outputs.cpu().numpy(), self.action_space)[0]


def _head(inputs: int, outputs: int) -> nn.Linear:
    # Zero weights prefer no action, so that only perturbations make members differ.
    head = nn.Linear(inputs, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
