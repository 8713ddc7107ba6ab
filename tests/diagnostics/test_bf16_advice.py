"""Evaluations in bfloat16 on a processor without units for it are told of once, where they take time."""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import Any

import pytest
import torch
from helpers import make, network

from eggroll_trainer import _torch
from eggroll_trainer.diagnostics import precision

BF16 = torch.bfloat16


def fitness(model: torch.nn.Module) -> float:
    x = torch.ones(1, 4, dtype=next(model.parameters()).dtype)
    return -model(x).double().square().sum().item()


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(precision, "_SECONDS", 0.0)


def told(trainer: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            trainer.step()
    return [str(warning.message) for warning in caught]


def test_autocast(without_units: None) -> None:
    (message,) = told(make(fitness_fn=fitness, evaluation_dtype=BF16, chunk_size=4))
    assert "evaluates in bfloat16" in message and "trainer.evaluation_dtype = None" in message


def test_a_model_in_bf16(without_units: None) -> None:
    (message,) = told(make(model=network(BF16), fitness_fn=fitness))
    assert "model.float()" in message


@pytest.mark.parametrize("options", [{}, {"evaluation_dtype": torch.float16}, {"model": network(torch.float64)}])
def test_other_types_are_not_meant(options: dict[str, Any], without_units: None) -> None:
    assert told(make(fitness_fn=fitness, **options)) == []


def test_silent_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_SECONDS", 0.0)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert told(make(fitness_fn=fitness, evaluation_dtype=BF16)) == []


def test_silent_where_it_takes_no_time_and_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert told(make(fitness_fn=fitness, evaluation_dtype=BF16)) == []
    assert precision.bf16_advice(torch.device("cuda"), BF16, [torch.float32], 100.0) is None
    assert precision.bf16_advice(torch.device("cpu"), BF16, [torch.float32], 100.0) is not None


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "bf16": True}, True),
    ],
)
def test_what_torch_says_of_the_processor(
    capabilities: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities), raising=False)
    assert _torch.cpu_has_bf16() is expected


@pytest.mark.parametrize(
    "machine, avx, amx, expected",
    [("x86_64", False, False, False), ("AMD64", True, False, True), ("x86_64", False, True, True),
     ("aarch64", False, False, True)],
)  # fmt: skip
def test_what_earlier_releases_say(
    machine: str, avx: bool, amx: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(_torch.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert _torch.cpu_has_bf16() is expected
    # Not known: silence.
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert _torch.cpu_has_bf16() is True
