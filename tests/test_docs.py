"""The Python blocks of the README and the pages, as they stand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import make
from peft_adapters import quiet
from ray_cluster import Cluster

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str, **names: object) -> dict[str, object]:
    found = blocks(page)
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    return names


def test_every_page_with_code_is_run_here() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page for page in pages if blocks(page)} == {
        "README.md",
        "docs/ask-and-tell.md",
        "docs/distributed.md",
        "docs/language-models.md",
        "docs/language-models-export.md",
        "docs/reinforcement-learning.md",
        "docs/scores.md",
    }


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    language_models = pytest.importorskip("language_models")
    words = {"tokenizer": language_models.tokenizer(), "language_model": language_models.language_model()}
    names = run("README.md", **words, dataset=["a b"] * 8, reward_fn=lambda completions, **_: [0.0] * len(completions))
    trainer, model = names["trainer"], names["best_model"]
    assert trainer.history["fitness"][-1] > trainer.history["fitness"][0]  # type: ignore[attr-defined]
    assert isinstance(model, torch.nn.Module) and (tmp_path / "run.pt").exists()
    assert trainer.engine.rank == 0  # type: ignore[attr-defined]


def test_ask_and_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one"):
        names = run("docs/ask-and-tell.md")
    trainer = names["trainer"]
    assert trainer.generation == 21  # type: ignore[attr-defined]
    means = trainer.history["mean_fitness"]  # type: ignore[attr-defined]
    assert means[19] > means[0]


def test_scores() -> None:
    torch.manual_seed(0)
    names = run("docs/scores.md")
    assert names["trainer"].last_generation.scores.shape == (64, 6)  # type: ignore[attr-defined]


def test_reinforcement_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    run("docs/reinforcement-learning.md")


def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    with quiet():
        importlib.import_module("train_on_server").make_tiny_model(Path("models/smollm2"))
        names = run("docs/language-models.md")
    assert names["trainer"].last_generation.scores.shape == (8, 2)  # type: ignore[attr-defined]


def test_language_models_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    with quiet():
        importlib.import_module("train_on_server").make_tiny_model(Path("models/smollm2"))
        names = run("docs/language-models-export.md")
    assert names["trainer"].generation == 4  # type: ignore[attr-defined]
    assert names["update"].score_kept is not None  # type: ignore[attr-defined]
    assert [path.name for path in names["folders"]][-1] == "generation-4-member-15"  # type: ignore[attr-defined]
    assert all(Path(folder).exists() for folder in ("merged", "adapter", "trained-adapter"))


def test_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    group_engine, checkpoints, log, _ = blocks("docs/distributed.md")
    names: dict[str, object] = {"trainer": make()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in (group_engine, checkpoints):
            exec(block, names)
        assert names["trainer"].generation == 1000  # type: ignore[attr-defined]
        names["trainer"] = make()
        exec(log, names)
        assert names["trainer"].generation == 40  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_distributed_by_ray(cluster: Cluster, tmp_path: Path) -> None:
    *_, ray_engine = blocks("docs/distributed.md")
    assert cluster.run(tmp_path, ray_engine + "print(engine.threads, engine.timeout)") == ["1 600.0"]
