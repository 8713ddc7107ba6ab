"""The centre of the population: its weights, and the optimizer that moves them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..perturbation.sample import wide_dtype
from .optimizers import OptimizerFactory, check_optimizer

# Numbers whose change is measured at a time on a CPU.
_PIECE = 2**18


class Centre:
    """The trained parameters, kept in float32 or wider, and a ``torch.optim`` optimizer over them.

    The optimizer gets the negated estimate of the ascent direction as ``.grad``; plain SGD makes that
    ``θ ← θ + learning_rate·Δθ``. Parameters in bf16 or fp16 are rounded copies of float32 masters, so that steps
    below their resolution add up and nothing drifts.

    Args:
        groups: The trainer's parameter groups.
        factory: ``(groups, lr=…) → torch.optim.Optimizer``.

    Attributes:
        candidates: The parameters of the groups by name, be they trained or not.
        parameters: Those that are, or have been, trained.
        masters: What the optimizer has in the place of each of these.
        fixed_rows: Indices in the first dimension that no step changes, by parameter; such as an embedding's padding.

    Raises:
        TypeError: ``factory`` returns something else.
        ValueError: The optimizer is over other parameters, maximises, or cannot step from a dense gradient.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, groups: Sequence[dict[str, Any]], factory: OptimizerFactory) -> None:
        self.factory, self._groups = factory, groups
        self.candidates: dict[str, nn.Parameter] = {
            name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)
        }
        self._placements = {name: (p.dtype, p.device) for name, p in self.candidates.items()}
        self.fixed_rows: dict[str, Sequence[int]] = {}
        self.parameters = {name: p for name, p in self.candidates.items() if p.requires_grad}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        check_optimizer(factory, self._masters_in_groups(self.masters))
        self.optimizer = self._optimizer_of(self.masters)

    @torch.inference_mode(False)
    @torch.no_grad()
    def hold(self, names: Collection[str]) -> None:
        """Make ``parameters`` those of these names, in the order of the groups.

        The optimizer is made anew, and keeps what it knows of those that stay.
        """
        parameters = {name: p for name, p in self.candidates.items() if name in names}
        if parameters.keys() == self.parameters.keys():
            return
        masters = {name: self.masters[name] if name in self.masters else _master(p) for name, p in parameters.items()}
        optimizer, old = self._optimizer_of(masters), self.optimizer
        for group, before in zip(optimizer.param_groups, old.param_groups, strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})
        optimizer.state.update({master: old.state[master] for master in masters.values() if master in old.state})
        self.parameters, self.masters, self.optimizer = parameters, masters, optimizer

    @torch.inference_mode(False)
    def restart(self) -> None:
        """Make a new optimizer, without state."""
        self.optimizer = self._optimizer_of(self.masters)

    def _masters_in_groups(self, masters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        """Return the groups as the optimizer gets them; one may have no parameters."""
        return [
            {"params": [masters[name] for name in group["names"] if name in masters], "lr": group["lr"]}
            for group in self._groups
        ]

    def _optimizer_of(self, masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        own = self._masters_in_groups(masters)
        optimizer = self.factory(own, lr=own[0]["lr"])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must make a torch.optim.Optimizer from (params, lr=…), such as torch.optim.Adam or"
                f" functools.partial(torch.optim.SGD, momentum=0.9); it made a {type(optimizer).__name__}"
            )
        if _members(optimizer.param_groups) != _members(own):
            raise ValueError(
                "optimizer must be made over the parameter groups that it is given; its own are"
                f" {len(optimizer.param_groups)} groups of other parameters or in another order"
            )
        if any(group.get("maximize", False) for group in optimizer.param_groups):
            raise ValueError("optimizer must not have maximize=True: it gets -Δθ, so that it maximises the fitness")
        return optimizer

    def check_model(self, model: nn.Module) -> None:
        """Raise ``RuntimeError`` unless the model still has these parameters, as they were."""
        current = dict(model.named_parameters(remove_duplicate=False))
        for name, p in self.parameters.items():
            if current.get(name) is not p or (p.dtype, p.device) != self._placements[name]:
                raise RuntimeError(
                    f"parameter {name!r} of the model was replaced, converted or moved after this trainer was made,"
                    " which would go on with the old one; make a new trainer"
                )

    def __len__(self) -> int:
        """Return the number of weights in ``parameters``, ``D``."""
        return sum(p.numel() for p in self.parameters.values())

    def length(self) -> float:
        """Return the Euclidean length of all weights."""
        return _length([master.detach() for master in self.masters.values()])

    def flat(self) -> Tensor:
        """Return all weights in one new tensor, ``[D]``."""
        self._follow()
        return self.flatten({name: self.masters[name].detach() for name in self.parameters})

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return one tensor ``[D]`` of a value for each parameter."""
        return torch.cat([values[name].reshape(-1) for name in self.parameters])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the part of ``flat``, ``[..., D]``, that belongs to each parameter, ``[..., *shape]``."""
        parts = flat.split([p.numel() for p in self.parameters.values()], -1)
        return {
            name: part.reshape((*flat.shape[:-1], *p.shape))
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    @torch.no_grad()
    def assign(self, flat: Tensor) -> None:
        """Set all weights from ``[D]``."""
        for name, value in self.unflatten(flat).items():
            self.masters[name].copy_(value)
        self._publish()

    @contextlib.contextmanager
    def stepped(
        self, gradient: Mapping[str, Tensor], learning_rates: Sequence[float], anchor: Mapping[str, Tensor]
    ) -> Iterator[float]:
        """Make one step against ``gradient``; if it or the block raises, weights and optimizer are put back.

        Args:
            gradient: The negated estimate of the ascent direction, for every parameter that is not frozen; the
                optimizer may change it.
            learning_rates: For each group.
            anchor: The values that groups with an ``anchor_decay`` are pulled back to.

        Yields:
            The Euclidean length of the step.

        Raises:
            ValueError: The gradient, or the weights after the step, are not finite.
        """
        self._follow()
        before = {name: self.masters[name].detach().clone() for name in gradient}
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            with torch.no_grad():
                self._pull(gradient, learning_rates, anchor)
                length = self._move(gradient, learning_rates, before)
                self._publish()
            yield length
        except BaseException:
            with torch.no_grad():
                for name, old in before.items():
                    self.masters[name].copy_(old)
                self.optimizer.load_state_dict(state)
                self._publish()
            raise

    def _pull(self, moved: Collection[str], learning_rates: Sequence[float], anchor: Mapping[str, Tensor]) -> None:
        """Make the part of the step that does not depend on the gradient, as AdamW does with its weight decay."""
        for group, learning_rate in zip(self._groups, learning_rates, strict=True):
            share = learning_rate * group["anchor_decay"]
            for name in group["names"]:
                if share > 0 and name in moved:
                    self.masters[name].lerp_(anchor[name].to(self.masters[name]), share)

    def _move(
        self, gradient: Mapping[str, Tensor], learning_rates: Sequence[float], before: Mapping[str, Tensor]
    ) -> float:
        """Let the optimizer step the masters and return how far."""
        gradients = {name: master.grad for name, master in self.masters.items()}
        try:
            for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = learning_rate
            for name, master in self.masters.items():
                # Optimizers leave out what has no gradient.
                master.grad = gradient[name].to(master) if name in gradient else None
            self.optimizer.step()
        finally:
            # A model that is also trained by gradients keeps the ones it has.
            for name, master in self.masters.items():
                master.grad = gradients[name]
        for name, rows in self.fixed_rows.items():
            if name in before:
                # Weight decay moves what has a gradient of zero.
                self.masters[name][rows] = before[name][rows]
        length = _distance([self.masters[name] for name in before], list(before.values()))
        if not math.isfinite(length):
            if not math.isfinite(_length(list(gradient.values()))):
                raise ValueError(
                    "the update is not finite, and the parameters were not changed: scale the fitness down, or shape it"
                )
            raise ValueError(
                "the step leads to weights that are not finite; they were not changed. Lower learning_rate"
            )
        return length

    def optimizer_options(self) -> list[str]:
        """Return the optimizer's options besides learning rates, such as betas, in words; one entry for each group."""
        groups = self.optimizer.param_groups
        return [str({k: v for k, v in group.items() if k not in ("params", "lr")}) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the optimizer's state, not copied."""
        self._follow()
        return {
            "parameters": {name: self.masters[name].detach() for name in self.parameters},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a copy of what :meth:`state_dict` returned.

        Raises:
            ValueError: The state is of other parameters or another optimizer.
        """
        self.hold(state["parameters"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name in self.parameters:
            self.masters[name].copy_(state["parameters"][name])
        self._publish()

    def _publish(self) -> None:
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    @torch.no_grad()
    def _follow(self) -> None:
        """Take over what somebody else has written into the model, by ``load_state_dict`` say."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p:
                # Elsewhere the master keeps its digits below the resolution of the model.
                master.copy_(torch.where(p == master.to(p.dtype), master, p.to(master.dtype)))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter if it is wide enough, or a wide copy."""
    wide = wide_dtype(parameter)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))


def _members(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in groups]


def _distance(new: list[Tensor], old: list[Tensor]) -> float:
    """Return the Euclidean length of what has changed."""
    if sum(value.numel() for value in new) <= _PIECE or any(value.device.type != "cpu" for value in new):
        return _length([a - b for a, b in zip(new, old, strict=True)])
    pairs = zip(new, old, strict=True)
    pieces = (zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True) for a, b in pairs)
    # Each piece is in the cache while it is used.
    return _root_of_squares([torch.linalg.vector_norm(a - b) for piece in pieces for a, b in piece])


def _length(values: Sequence[Tensor]) -> float:
    """Return the Euclidean length of tensors taken together."""
    return _root_of_squares([torch.linalg.vector_norm(value.flatten()) for value in values])


def _root_of_squares(norms: Sequence[Tensor]) -> float:
    # In one piece, so that an accelerator is waited for once; the sum of the squares is taken in float64.
    return torch.stack([norm.double().to(norms[0].device) for norm in norms]).square().sum().sqrt().item()
