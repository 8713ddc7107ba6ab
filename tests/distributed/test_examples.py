"""An example as it stands, on every engine."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, python, torchrun

DIGITS = ROOT / "examples" / "digits.py"
MODULES = ("sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "tyro")


def score(run: Callable[..., str], folder: Path, *arguments: Any) -> str:
    small = ("--generations", 8, "--population-size", 256, "--batch-size", 100, "--plot", folder / "plot.png")
    printed = run(DIGITS, *small, *arguments, modules=MODULES)
    found = re.findall(r"test accuracy:\s+([\d.]+%)", printed)
    assert len(found) == 1, printed
    assert (folder / "plot.png").exists()
    return found[0]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    return score(python, tmp_path_factory.mktemp("local"))


def test_the_same_score_under_torchrun(local: str, tmp_path: Path) -> None:
    assert score(functools.partial(torchrun, 2), tmp_path) == local


@pytest.mark.usefixtures("ray")
def test_the_same_score_on_ray(local: str, tmp_path: Path) -> None:
    assert score(python, tmp_path, "--engine", "ray") == local
