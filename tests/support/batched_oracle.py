"""The oracle of whole models: a population's forward against the user's own model with each member's weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rule_oracle import reference_attention
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from eggroll_trainer import EGGROLLTrainer, Population, batched

N = 4


class Result(NamedTuple):
    """What came of a population's forward.

    Attributes:
        outcome: "right", "right, with a warning", "wrong", "error", or "no test": right, but all members are equal.
        detail: The warning, the error, or what differs.
    """

    outcome: str
    detail: str = ""


def compare_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    own: bool = False,
    sigma: float = 0.1,
    tolerance: float = 2e-5,
) -> Result:
    """Call all members of a population, and compare with the members one by one.

    Args:
        model: The centre; it is left as it was.
        args: Arguments of its forward.
        kwargs: Likewise.
        own: Whether each member is given arguments of its own, as they may be; they are equal.
        sigma: Standard deviation of the perturbations.
        tolerance: Of an output, as a share of its largest number.
    """
    outputs: list[Any] = []

    @batched
    def fitness(population: Population) -> Tensor:
        given_args, given_kwargs = tree_map(_for_each, (args, kwargs)) if own else copy.deepcopy((args, kwargs))
        outputs[:] = [(population.each if own else population)(*given_args, **given_kwargs)]
        return torch.arange(float(N))

    with reference_attention():
        try:
            with _recorded() as said:
                trainer = EGGROLLTrainer(
                    model=copy.deepcopy(model), fitness_fn=fitness, population_size=N, sigma=sigma, seed=0
                )
                weights = trainer.current_params + trainer.sample_perturbations(N)
                trainer.step()
        except Exception as error:
            return Result("error", f"{type(error).__name__}: {error}")
        with _recorded() as said_by_members:
            expected = _one_by_one(copy.deepcopy(model), weights, args, kwargs)
    difference = _difference(tree_flatten(outputs[0]), expected, tolerance)
    if difference:
        return Result("wrong", difference)
    if all(_equal(values, expected[0][0]) for values, _ in expected):
        return Result("no test")
    unexpected = [message for message in said if message not in said_by_members]
    return Result("right, with a warning", unexpected[0]) if unexpected else Result("right")


def _for_each(leaf: Any) -> Any:
    return leaf.expand(N, *leaf.shape).clone() if isinstance(leaf, Tensor) else leaf


def _equal(values: list[Any], others: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values, others, strict=True) if isinstance(a, Tensor))


@contextlib.contextmanager
def _recorded() -> Iterator[list[str]]:
    """Collect the texts of all warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


def _one_by_one(model: nn.Module, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the flattened output of each member."""
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    members = []
    with torch.no_grad():
        for row in weights:
            for p, own in zip(trained, row.split([p.numel() for p in trained]), strict=True):
                p.copy_(own.view_as(p))
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            members.append(tree_flatten(model(*copy.deepcopy(args), **copy.deepcopy(kwargs))))
    return members


def _difference(actual: Any, expected: list[Any], tolerance: float) -> str:
    """Return what differs, or nothing."""
    leaves, spec = actual
    if any(own != spec for _, own in expected):
        return f"a result of another form: {spec} instead of {expected[0][1]}"
    for i, leaf in enumerate(leaves):
        column = [values[i] for values, _ in expected]
        if not isinstance(leaf, Tensor):
            if any(value != leaf for value in column):
                return f"{leaf} instead of {column[0]}"
            continue
        stacked = torch.stack(column)
        if leaf.shape != stacked.shape or leaf.dtype != stacked.dtype:
            return f"{leaf.dtype}{list(leaf.shape)} instead of {stacked.dtype}{list(stacked.shape)}"
        if not leaf.is_floating_point():
            if not torch.equal(leaf, stacked):
                return f"{leaf} instead of {stacked}"
        elif not torch.equal(leaf.isfinite(), stacked.isfinite()):
            return "other numbers are finite"
        else:
            scale = stacked.nan_to_num(0, 0, 0).abs().max() if stacked.numel() else 0
            largest = (leaf - stacked).nan_to_num(0, 0, 0).abs().max() if stacked.numel() else 0
            if largest > tolerance * scale:
                return f"an output of up to {scale:.3g} is off by {largest:.3g}"
    return ""
