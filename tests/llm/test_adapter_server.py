"""The examples of a server of adapters and of training on it, in two processes of their own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launching import ROOT, python, start
from peft_adapters import load, quiet

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("tyro")

SIZES: dict[str, Any] = {
    "generations": 2,
    "population_size": 4,
    "max_tokens": 4,
    "at_a_time": 2,
    "adapter_rank": 2,
    "sigma": 0.1,
}


def example(name: str) -> ModuleType:
    """Import a script of examples/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for their module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def client() -> ModuleType:
    return example("train_on_server")


@pytest.fixture(scope="module")
def model(client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    client.make_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    script = ROOT / "examples" / "adapter_server.py"
    with start(script, model, "--port", 0, "--max-adapters", 2) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]


def options(**values: Any) -> list[Any]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def in_this_process(client: Any, folder: Path, model: Path) -> list[list[float]]:
    """Train as the example does, with the members in the model itself."""
    complete = example("adapter_server").complete
    tokenizer = client.PreTrainedTokenizerFast.from_pretrained(model, padding_side="left")
    with quiet():
        trainer = client.make_trainer(client.Args(**SIZES, model=str(model)))
    history = []
    for _ in range(SIZES["generations"]):
        population, scores = trainer.ask(), []
        for member in range(len(population)):
            with population.holding(member):
                completions = complete(trainer.model, tokenizer, client.PROMPTS, SIZES["max_tokens"])
            scores.append(sum(map(client.reward, completions)) / len(completions))
        trainer.tell(scores)
        history.append(scores)
    with quiet():
        trainer.model.save_pretrained(folder)
    return history


def test_members_on_a_server_score_what_they_score_here(client: Any, model: Path, url: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "train_on_server.py"
    python(script, *options(**SIZES, model=model, url=url, folder=tmp_path / "run"))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    threads = torch.get_num_threads()
    try:
        # As in the processes, of which both have one.
        torch.set_num_threads(1)
        expected = in_this_process(client, tmp_path / "here", model)
    finally:
        torch.set_num_threads(threads)
    assert scores == expected
    assert len(set(scores[0])) > 1, "the scores say something"
    # And the same adapter comes out.
    base = client.LlamaForCausalLM.from_pretrained(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        there, here = (load(base, path)(ids).logits for path in (tmp_path / "run" / "adapter", tmp_path / "here"))
        assert torch.equal(there, here) and not torch.equal(there, base(ids).logits)
    assert not (tmp_path / "run" / "members").exists()


def test_the_limits_of_the_server(client: Any, model: Path, url: str, tmp_path: Path) -> None:
    with quiet():
        trainer = client.make_trainer(client.Args(**SIZES, model=str(model)))
        adapters = client.write_adapters(trainer.ask(), tmp_path)
    server = client.Client(url)
    for adapter in adapters[:2]:
        server.load(adapter.name, adapter)
    with pytest.raises(RuntimeError, match="400.*2 adapters are loaded, and there is no room for more"):
        server.load(adapters[2].name, adapters[2])
    with pytest.raises(RuntimeError, match="400.*loaded already: give one with other weights another name"):
        server.load(adapters[0].name, adapters[3])
    server.unload(adapters[0].name)
    with pytest.raises(RuntimeError, match=f"400.*no adapter '{adapters[0].name}' is loaded"):
        server.complete(adapters[0].name, ["a"], 2)
    with pytest.raises(RuntimeError, match="400.*there is no adapter in"):
        server.load("other", tmp_path)
    with pytest.raises(RuntimeError, match="404"):
        server._post("other", {})
    with pytest.raises(RuntimeError, match="400.*KeyError: 'prompt'"):
        server._post("completions", {"model": str(model)})
    # The base model, with and without adapters beside it.
    beside = server.complete(str(model), client.PROMPTS, 8)
    adapted = server.complete(adapters[1].name, client.PROMPTS, 8)
    server.unload(adapters[1].name)
    assert server.complete(str(model), client.PROMPTS, 8) == beside != adapted


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    printed = python(ROOT / "examples" / "train_on_server.py", "--smoke", "--folder", tmp_path)
    means = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("generation")]
    assert len(means) == 20
    # The share of digits: by chance 10 of 69 characters.
    assert means[0] < 0.25 and means[-1] > 0.5
