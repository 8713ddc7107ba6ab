"""The Python blocks of the README and of the site's pages, as they stand."""

from __future__ import annotations

import contextlib
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import make
from peft_adapters import quiet
from ray_cluster import Cluster

ROOT = Path(__file__).parents[1]
GUIDE = "docs/user-guide/"
# Pages whose blocks need something that they don't make, each with a test of its own below.
PREPARED = {
    "README.md",
    GUIDE + "ask-and-tell.md",
    GUIDE + "language-models-export.md",
    GUIDE + "language-models.md",
    GUIDE + "many-machines.md",
    GUIDE + "scores.md",
}
# Blocks in the language of another library, with its name: ```{.python .evotorch}
PEERS = ["evotorch", "evosax", "trl"]
# The same of code that is no package, so that nothing can run it.
REPOSITORIES = ["hyperscalees", "es_at_scale"]
_FENCE = r"^(?P<indent> *)```{}\n(?P<code>.*?)^(?P=indent)```$"


def blocks(page: str, info: str = "python") -> list[str]:
    """Return the blocks of a page; those in tabs are indented."""
    pattern = re.compile(_FENCE.replace("{}", re.escape(info) + r"(?: title=\"[^\"]*\")?"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(match["code"]) for match in pattern.finditer((ROOT / page).read_text())]


def run(page: str, **names: Any) -> dict[str, Any]:
    found = blocks(page)
    assert found
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def all_pages() -> list[str]:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in paths]


@contextlib.contextmanager
def tiny_language_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block, ``models/smollm2`` of the current folder is a tiny model of random weights."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(ROOT / "examples")
    with quiet():
        importlib.import_module("train_on_server").make_tiny_model(Path("models/smollm2"))
        yield


PLAIN = [page for page in all_pages() if page not in PREPARED and blocks(page)]


def test_pages_are_found() -> None:
    assert len(PLAIN) > 5
    assert all(blocks(page) for page in PREPARED)


def test_no_block_is_left_out() -> None:
    """A block in Python is run, is another library's, or is the source of an example, which tests of its own run."""
    known = {"python", *(f"{{.python .{peer}}}" for peer in PEERS + REPOSITORIES)}
    for page in all_pages():
        for info in re.findall(r"^ *```(.*(?:python|py\b).*)$", (ROOT / page).read_text(), re.MULTILINE):
            info = re.sub(r' title="[^"]*"', "", info)
            assert info in known or info.startswith("{.python .source"), (page, info)
    for name in REPOSITORIES:
        for block in (block for page in all_pages() for block in blocks(page, f"{{.python .{name}}}")):
            compile(block, name, "exec")


@pytest.mark.parametrize("page", PLAIN)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "".join(blocks(page))
    if "gymnasium" in code or "eggroll_trainer.rl" in code:
        pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    if "models/smollm2" not in code:
        run(page)
        return
    with tiny_language_model(monkeypatch):
        run(page)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(peer)
    monkeypatch.chdir(tmp_path)
    found = [block for page in all_pages() for block in blocks(page, f"{{.python .{peer}}}")]
    assert found
    with tiny_language_model(monkeypatch) if peer == "trl" else contextlib.nullcontext():
        for block in found:
            exec(compile(block, peer, "exec"), {})


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run("README.md")
    trainer, model = names["trainer"], names["best_model"]
    assert trainer.history["fitness"][-1] > trainer.history["fitness"][0]
    assert isinstance(model, torch.nn.Module) and (tmp_path / "run.pt").exists()
    assert trainer.engine.rank == 0


def test_links_of_the_readme() -> None:
    """The site's build checks its own links; the README and CONTRIBUTING are read outside of it."""
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!http)([^)#]*)#?[^)]*\)", (ROOT / page).read_text()):
            assert not link or (ROOT / link).exists(), (page, link)


def test_ask_and_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one"):
        names = run(GUIDE + "ask-and-tell.md")
    trainer = names["trainer"]
    assert trainer.generation == 21
    means = trainer.history["mean_fitness"]
    assert means[19] > means[0]


def test_scores() -> None:
    torch.manual_seed(0)
    names = run(GUIDE + "scores.md")
    assert names["trainer"].last_generation.scores.shape == (64, 6)


def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tiny_language_model(monkeypatch):
        names = run(GUIDE + "language-models.md")
    assert names["trainer"].last_generation.scores.shape == (8, 2)


def test_language_models_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tiny_language_model(monkeypatch):
        names = run(GUIDE + "language-models-export.md")
    assert names["trainer"].generation == 4
    assert names["update"].score_kept is not None
    assert [path.name for path in names["folders"]][-1] == "generation-4-member-15"
    assert all(Path(folder).exists() for folder in ("merged", "adapter", "trained-adapter"))


@pytest.mark.slow
def test_many_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    group_engine, checkpoints, log, _ = blocks(GUIDE + "many-machines.md")
    names: dict[str, Any] = {"trainer": make()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in (group_engine, checkpoints):
            exec(block, names)
        assert names["trainer"].generation == 1000
        names["trainer"] = make()
        exec(log, names)
        assert names["trainer"].generation == 40
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_many_machines_by_ray(cluster: Cluster, tmp_path: Path) -> None:
    *_, ray_engine = blocks(GUIDE + "many-machines.md")
    assert cluster.run(tmp_path, ray_engine + "print(engine.threads, engine.timeout)") == ["1 600.0"]
