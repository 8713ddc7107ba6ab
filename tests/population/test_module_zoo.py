"""Every module of torch's own test suite: the population's forward equals the members one by one, or says why not."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from batched_oracle import compare_forward
from torch import nn

OUTCOMES = ("right", "right, with a warning", "wrong", "error", "no test")
# Modules whose parameters are made by their first forward, and batch normalisation of members' own batches.
CLEAR_ERRORS = ("run the model once before training it", "is in training mode and would update its running statistics")


class Sample(NamedTuple):
    """A module of torch's suite with an input.

    Attributes:
        name: As in ``nn.Linear``.
        description: Its arguments.
        module: The module, in training or evaluation mode.
        args: Those of its forward.
        kwargs: Likewise.
    """

    name: str
    description: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@pytest.fixture(scope="module")
def module_db() -> Iterator[Any]:
    """Torch's table of its modules."""
    flags = torch.backends.__allow_nonbracketed_mutation_flag
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("expecttest") is None:
            # Torch's suite imports it for tests of printed text, which are not used here.
            stand_in: Any = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase
            patch.setitem(sys.modules, "expecttest", stand_in)
        from torch.testing._internal.common_modules import module_db
    # The import forbids to set flags of torch.backends from then on.
    torch.backends.__allow_nonbracketed_mutation_flag = flags
    yield module_db


def samples(module_db: Any, training: bool) -> Iterator[Sample]:
    """Yield every sample that has parameters."""
    for info in module_db:
        torch.manual_seed(0)
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
        ):
            made = sample.constructor_input
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = info.module_cls(*made.args, **made.kwargs).train(training)
            if sample.forward_input is not None and any(True for _ in module.parameters()):
                description = f"{info.name}{made.args}{made.kwargs} {'training' if training else 'evaluation'}"
                yield Sample(info.name, description, module, sample.forward_input.args, sample.forward_input.kwargs)


def results(chosen: Iterable[Sample], own: bool) -> dict[str, list[str]]:
    """Return the descriptions of samples by what came out."""
    found: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for sample in chosen:
        result = compare_forward(sample.module, sample.args, sample.kwargs, own=own)
        found[result.outcome].append(f"{sample.description}: {result.detail}")
    return found


def check(found: dict[str, list[str]], right: int) -> None:
    """Assert that nothing is wrong, that errors say what to do, and that at least so many are right."""
    print({outcome: len(descriptions) for outcome, descriptions in found.items()})
    assert not found["wrong"], "\n".join(found["wrong"])
    unclear = [text for text in found["error"] if not any(error in text for error in CLEAR_ERRORS)]
    assert not unclear, "\n".join(unclear)
    assert len(found["right"]) + len(found["right, with a warning"]) >= right


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_some_samples_of_every_module(module_db: Any, training: bool) -> None:
    count: Counter[str] = Counter()
    chosen = []
    for sample in samples(module_db, training):
        if count[sample.name] % 20 == 0:
            chosen.append(sample)
        count[sample.name] += 1
    check(results(chosen, own=False), right=70)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("own", [False, True], ids=["same_inputs", "own_inputs"])
def test_every_sample(module_db: Any, training: bool, own: bool) -> None:
    check(results(samples(module_db, training), own), right=1000)
