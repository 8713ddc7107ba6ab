"""The device of every tensor is chosen: whole generations on a pretend accelerator, and with another default device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import start_python
from torch.utils import backend_registration

from eggroll_trainer.distributed.process_group import _Report

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this release of torch has no devices written in Python", allow_module_level=True)

import device_walks  # noqa: E402


def output(call: str) -> Any:
    # A device of torch's stays for the rest of the process.
    with start_python(call) as process:
        printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(printed)


@pytest.fixture(scope="module")
def walks() -> Any:
    return output("device_walks.run")


@pytest.mark.parametrize("setting", device_walks.SETTINGS)
@pytest.mark.parametrize("name", device_walks.WALKS)
def test_a_generation_keeps_to_its_device(name: str, setting: str, walks: Any) -> None:
    expected, outcome = flat(walks[name]["expected"]), flat(walks[name][setting])
    for value in (*expected, *outcome):
        assert not isinstance(value, str), value
    # The same operations, some of them made up of others.
    assert outcome == pytest.approx(expected, rel=1e-4)


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list) else [value]


def test_the_pretend_device_refuses_what_an_accelerator_refuses() -> None:
    results = output("device_walks.mix")
    assert (results.pop("numbers"), results.pop("moved"), results.pop("copied")) == ([3, 4, 5], [0, 2, 4], [0, 1, 2])
    assert set(results.values()) == {"refused"}


def test_a_process_without_work_reports_on_the_cpu() -> None:
    with torch.device("meta"):
        report = _Report.of(b"", [], None)
        assert report.scores.tolist() == [] == report.outcomes()
