"""Architectures of transformers with random weights: the population's forward equals the members one by one."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import MODELS, build
from batched_oracle import compare_forward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The package, which takes seconds to import."""
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("own", [False, True], ids=["same_inputs", "own_inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_batched_is_one_by_one(transformers: Any, name: str, own: bool) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"not in transformers {transformers.__version__}")
    options, make_inputs = MODELS[name]
    model, inputs = build(getattr(transformers, name), options), make_inputs()
    if own:
        # The models look at the numbers of a mask: with masks of their own, the members would run one by one.
        inputs.pop("attention_mask", None)
    result = compare_forward(model, (), inputs, own=own, sigma=0.05)
    assert result.outcome in ("right", "right, with a warning"), f"{result.outcome}: {result.detail}"


def test_there_are_enough_architectures(transformers: Any) -> None:
    assert sum(hasattr(transformers, name) for name in MODELS) >= 24
