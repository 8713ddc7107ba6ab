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
from .estimate import length_of, root_of_squares
from .optimizers import OptimizerFactory, check_optimizer

# Entries whose change is measured at a time on a CPU, so that they fit in its cache.
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
        candidates: All parameters of the groups, by name.
        parameters: The candidates that are trained now, or have been.
        masters: For each of these, the tensor in float32 or wider that the optimizer steps.
        fixed_rows: By parameter, the indices in the first dimension that no step changes, such as an embedding's
            padding.

    Raises:
        TypeError: ``factory`` does not return an optimizer.
        ValueError: The optimizer has other parameters, maximises, or cannot step from a dense gradient.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, groups: Sequence[dict[str, Any]], factory: OptimizerFactory) -> None:
        self.factory, self._groups = factory, groups
        self.candidates: dict[str, nn.Parameter] = {
            name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)
        }
        self._kinds = {name: _kind(p) for name, p in self.candidates.items()}
        self.fixed_rows: dict[str, Sequence[int]] = {}
        self.parameters = {name: p for name, p in self.candidates.items() if p.requires_grad}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        check_optimizer(factory, self._masters_in_groups(self.masters))
        self.optimizer = self._optimizer_of(self.masters)

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, names: Collection[str]) -> None:
        """Make the candidates of these names ``parameters``, in the order of the groups.

        A new optimizer takes over the options and the state of the parameters that stay.
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
        groups = self._masters_in_groups(masters)
        optimizer = self.factory(groups, lr=groups[0]["lr"])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must make a torch.optim.Optimizer from (params, lr=…), such as torch.optim.Adam or"
                f" functools.partial(torch.optim.SGD, momentum=0.9); it made a {type(optimizer).__name__}"
            )
        if _members(optimizer.param_groups) != _members(groups):
            raise ValueError(
                "optimizer must be made from the parameter groups that the factory is given, in their order; it has"
                f" {len(optimizer.param_groups)} groups of other parameters or in another order"
            )
        if any(group.get("maximize", False) for group in optimizer.param_groups):
            raise ValueError("optimizer must not have maximize=True: it gets -Δθ, so that it maximises the fitness")
        return optimizer

    def check_model(self, model: nn.Module) -> None:
        """Raise ``RuntimeError`` if a parameter of the model was replaced, converted, moved or reshaped."""
        current = dict(model.named_parameters(remove_duplicate=False))
        for name, p in self.parameters.items():
            if current.get(name) is not p or _kind(p) != self._kinds[name]:
                raise RuntimeError(
                    f"parameter {name!r} of the model was replaced, converted, moved or reshaped after this trainer was"
                    " made, and the trainer still has the old one: make a new trainer"
                )

    def __len__(self) -> int:
        """Return the number of weights in ``parameters``, ``D``."""
        return sum(p.numel() for p in self.parameters.values())

    def length(self) -> float:
        """Return the Euclidean norm of all weights."""
        return length_of([master.detach() for master in self.masters.values()])

    def flat(self) -> Tensor:
        """Return all weights in one new tensor, ``[D]``."""
        self._read_model()
        return self.flatten({name: self.masters[name].detach() for name in self.parameters})

    def stored(self) -> Tensor:
        """Return all weights as the model stores them in one new tensor ``[D]``, in the widest of its dtypes."""
        return self.flatten({name: p.detach() for name, p in self.parameters.items()})

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return one new tensor ``[D]`` of a value for each parameter."""
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
        self._write_model()

    @contextlib.contextmanager
    def stepped(
        self, gradient: Mapping[str, Tensor], learning_rates: Sequence[float], anchor: Mapping[str, Tensor]
    ) -> Iterator[float]:
        """Make one step against ``gradient``; if it or the block raises, weights and optimizer are restored.

        Args:
            gradient: The negated estimate of the ascent direction, for every parameter that is not frozen; the
                optimizer may change it.
            learning_rates: One for each group.
            anchor: The values to which an ``anchor_decay`` pulls parameters back.

        Yields:
            The Euclidean norm of the step.

        Raises:
            ValueError: The gradient, or the weights after the step, are not finite.
        """
        self._read_model()
        before = {name: self.masters[name].detach().clone() for name in gradient}
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            with torch.no_grad():
                self._pull(gradient, learning_rates, anchor)
                length = self._move(gradient, learning_rates, before)
                self._write_model()
            yield length
        except BaseException:
            with torch.no_grad():
                for name, old in before.items():
                    self.masters[name].copy_(old)
                self.optimizer.load_state_dict(state)
                self._write_model()
            raise

    def _pull(self, moved: Collection[str], learning_rates: Sequence[float], anchor: Mapping[str, Tensor]) -> None:
        """Pull weights to the anchor, apart from the optimizer's step, as AdamW does with its weight decay."""
        for group, learning_rate in zip(self._groups, learning_rates, strict=True):
            share = learning_rate * group["anchor_decay"]
            for name in group["names"]:
                if share > 0 and name in moved:
                    self.masters[name].lerp_(anchor[name].to(self.masters[name]), share)

    def _move(
        self, gradient: Mapping[str, Tensor], learning_rates: Sequence[float], before: Mapping[str, Tensor]
    ) -> float:
        """Let the optimizer step the masters, and return the Euclidean norm of the step."""
        gradients = {name: master.grad for name, master in self.masters.items()}
        try:
            for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = learning_rate
            for name, master in self.masters.items():
                # Optimizers skip parameters without a gradient.
                master.grad = gradient[name].to(master) if name in gradient else None
            self.optimizer.step()
        finally:
            # Restore the user's gradients, for a model that is also trained by backpropagation.
            for name, master in self.masters.items():
                master.grad = gradients[name]
        for name, rows in self.fixed_rows.items():
            if name in before:
                # Their gradient is zero, but weight decay moves them.
                self.masters[name][rows] = before[name][rows]
        length = _distance([self.masters[name] for name in before], list(before.values()))
        if not math.isfinite(length):
            if not math.isfinite(length_of(list(gradient.values()))):
                raise ValueError(
                    "the update is not finite; the parameters were not changed. Scale the fitness down, or use a"
                    ' shaping such as "zscore"'
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
        return {"parameters": self.weights(), "optimizer": self.optimizer.state_dict()}

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters by name, in float32 or wider, not copied."""
        self._read_model()
        return {name: self.masters[name].detach() for name in self.parameters}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a copy of what :meth:`state_dict` returned.

        Raises:
            ValueError: The state is of other parameters or another optimizer.
        """
        self.select(state["parameters"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name in self.parameters:
            self.masters[name].copy_(state["parameters"][name])
        self._write_model()

    def _write_model(self) -> None:
        """Copy the masters to the model."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    @torch.no_grad()
    def _read_model(self) -> None:
        """Copy values that others have written into the model, such as by ``load_state_dict``, to the masters."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p:
                # Unchanged entries keep the master's digits below the resolution of the model.
                master.copy_(torch.where(p == master.to(p.dtype), master, p.to(master.dtype)))


def _kind(p: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    """Return the properties of a parameter that must not change: dtype, device and shape."""
    return p.dtype, p.device, p.shape


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter if it is wide enough, or a wide copy."""
    wide = wide_dtype(parameter)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))


def _members(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in groups]


def _distance(new: list[Tensor], old: list[Tensor]) -> float:
    """Return the Euclidean distance between two lists of tensors."""
    if sum(value.numel() for value in new) <= _PIECE or any(value.device.type != "cpu" for value in new):
        return length_of([a - b for a, b in zip(new, old, strict=True)])
    pairs = zip(new, old, strict=True)
    pieces = (zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True) for a, b in pairs)
    # In pieces that stay in the cache.
    return root_of_squares([torch.linalg.vector_norm(a - b) for piece in pieces for a, b in piece])
