"""An example as it stands, on every engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, python, torchrun

DIGITS = ROOT / "examples" / "digits.py"


@pytest.mark.parametrize("engine", ["torchrun", "ray"])
def test_the_same_score_on_every_engine(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    small = ("--generations", 8, "--population-size", 256, "--batch-size", 100, "--plot", tmp_path / "plot.png")

    def score(printed: str) -> Any:
        found = re.findall(r"test accuracy:\s+([\d.]+%)", printed)
        assert len(found) == 1, printed
        return found[0]

    local = score(python(DIGITS, *small))
    (tmp_path / "plot.png").unlink()
    if engine == "ray":
        request.getfixturevalue("ray")
        assert score(python(DIGITS, *small, "--engine", "ray")) == local
    else:
        assert score(torchrun(2, DIGITS, *small)) == local
    assert (tmp_path / "plot.png").exists()
