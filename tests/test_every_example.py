"""The examples, for a moment each: ``python examples/NAME.py --smoke``."""

from __future__ import annotations

import importlib
from pathlib import Path

import matplotlib as mpl
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Those with tests of their own: commands, servers and language models.
ELSEWHERE = {
    "adapter_server",
    "ant",
    "cartpole",
    "digits",
    "halfcheetah",
    "hidden_velocities",
    "humanoid",
    "larger_number",
    "smollm2",
    "train_on_server",
}
SMOKE = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ELSEWHERE)


@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(mpl, "use", lambda backend: None)
    mpl.rcParams["backend"] = "agg"
    example = importlib.import_module(name)
    example.main(example.Args(smoke=True, plot=tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_every_example_has_a_page() -> None:
    pages = {path.stem for path in (EXAMPLES.parent / "docs" / "examples" / "source").glob("*.md")}
    assert pages == {path.stem for path in EXAMPLES.glob("*.py")}
    gallery = (EXAMPLES.parent / "docs" / "examples" / "index.md").read_text()
    assert [name for name in sorted(pages) if f"source/{name}.md" not in gallery] == []
