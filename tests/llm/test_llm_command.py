"""``eggroll llm`` as it is typed: a run's folder, a run that is killed and resumed, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from language_models import language_model, tokenizer
from launching import python, start, torchrun
from peft_adapters import load
from transformers import AutoModelForCausalLM

from eggroll_trainer.cli import main
from eggroll_trainer.llm.command import parsed
from eggroll_trainer.llm.presets import PRESETS, Preset

pytest.importorskip("tensorboard")
pytest.importorskip("tyro")

REWARDS = """
def share(completions, wanted, **columns):
    return [text.split().count(word) / 4 for text, word in zip(completions, wanted)]

def length(completion_ids, **columns):
    return [len(tokens) for tokens in completion_ids]

def same(prompts, **columns):
    return [0.0] * len(prompts)

def fails(prompts, **columns):
    raise ValueError("what went wrong")
"""
SMALL = ("--population-size", 8, "--max-new-tokens", 4, "--sigma", 0.1, "--prompts-per-generation", 4)
FUNCTIONS = ("--reward", "eggroll_rewards.py:share", "--reward", "eggroll_rewards:length", "--reward-weights", 1, -0.1)
SAMPLED = ("--temperature", 1, "--samples-per-prompt", 2, "--eval-temperature", 1, "--eval-samples", 2)
# What the command imports as it goes.
MODULES = ("eggroll_trainer.llm.command", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama")
RUN = (*SMALL, *FUNCTIONS, *SAMPLED, "--kl-penalty", 0.01, "--save-every", 2, "--eval-every", 3, "--chunk-size", 4)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and reward functions."""
    folder = tmp_path_factory.mktemp("llm")
    language_model(dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} {b}", "wanted": b, "text": f"{a} {b} {b}"} for a in "abcdefgh" for b in "kl"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eggroll_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # As in the processes that runs are compared with.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def typed(*arguments: object) -> list[str]:
    return ["llm", "model", *map(str, ("--data", "data.jsonl", *arguments))]


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    """Run the command here, and return what it said."""
    assert main(typed(*arguments)) == status
    said = capsys.readouterr()
    return said.out, said.err


def lines(folder: str, name: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in read]


def weights(folder: str) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def stop(folder: str, number: int, *arguments: object) -> tuple[int, str]:
    """Start a run in a process, send it a signal after its first checkpoint, and return status and stderr."""
    with start("-m", "eggroll_trainer", *typed(*arguments), "--out", folder, modules=MODULES) as process:
        while not [*(Path(folder) / "checkpoints").glob("checkpoint-*")]:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.wait(), errors


def test_a_run_leaves_everything(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, *RUN, "--generations", 7, "--out", "whole")
    names = {path.name for path in Path("whole").iterdir() if not path.name.startswith("events")}
    records = {"config.json", "metrics.jsonl", "evaluations.jsonl", "completions.jsonl"}
    assert names == {*records, "checkpoints", "model", "adapter"}
    assert [line["generation"] for line in lines("whole", "metrics.jsonl")] == [*range(1, 8)]
    assert lines("whole", "metrics.jsonl")[-1].keys() >= {"reward", "rewards/share", "rewards/length", "kl", "tokens"}
    evaluations, shown = lines("whole", "evaluations.jsonl"), lines("whole", "completions.jsonl")
    assert [line["generation"] for line in evaluations] == [0, 3, 6, 7]
    assert evaluations[0]["kl"] == 0 < evaluations[-1]["kl"] and "pass@2" in evaluations[0]
    # Two of the sixteen prompts are held out.
    assert [line["generation"] for line in shown] == [0, 0, 3, 3, 6, 6, 7, 7]
    assert len(shown[0]["completions"]) == len(shown[0]["rewards"]) == 2
    loaded = AutoModelForCausalLM.from_pretrained("whole/model")
    moved = [(p - q).abs().max() for p, q in zip(loaded.parameters(), language_model().parameters(), strict=True)]
    assert 0 < max(moved) < 1
    said = out.splitlines()
    assert said[0] == "run: whole" and "generation 3: reward" in out and said[-1].startswith("next: ")
    assert "rank 16, which keeps 100.0% of the change's energy" in out
    ids = torch.tensor([[7, 8, 9]])
    adapted = load(AutoModelForCausalLM.from_pretrained("model"), Path("whole/adapter"))
    torch.testing.assert_close(adapted(ids).logits, loaded(ids).logits)


def test_where_nothing_was_learnt_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, _ = run(capsys, *SMALL, "--reward", "eggroll_rewards:same", "--generations", 2, "--out", tmp_path)
    assert "next: nothing was learnt, as all members had the same score" in out.splitlines()[-1]
    assert not (tmp_path / "adapter").exists()


def test_completions_are_shown_in_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(capsys, *SMALL, *FUNCTIONS[:2], "--generations", 1, "--adapter-rank", 0, "--out", "board")
    shown = EventAccumulator("board").Reload()
    assert {"reward", "eval/reward", "update_norm"} <= {*shown.Tags()["scalars"]}
    texts = shown.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [0, 1]
    assert lines("board", "completions.jsonl")[0]["prompt"] in str(texts[0].tensor_proto.string_val[0])


def test_killed_and_resumed_is_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*RUN, "--generations", 7)
    if not Path("whole").exists():
        run(capsys, *arguments, "--out", "whole")
    status, _ = stop("killed", signal.SIGKILL, *arguments)
    assert status == -signal.SIGKILL and len(lines("killed", "metrics.jsonl")) < 7
    python("-m", "eggroll_trainer", *typed(*arguments), "--out", "killed", "--resume", modules=MODULES)
    for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl"):
        assert lines("killed", name) == lines("whole", name)
    assert weights("killed") == weights("whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_to_resume(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, folder = (*RUN, "--save-every", 1), f"stopped-{status}"
    ended, errors = stop(folder, number, *arguments, "--generations", 10**6)
    assert ended == status and "Traceback" not in errors
    assert number == signal.SIGTERM or "continue with: eggroll llm model --data data.jsonl" in errors
    done = lines(folder, "metrics.jsonl")[-1]["generation"]
    checkpoint = max(Path(folder, "checkpoints").glob("checkpoint-*"))
    assert checkpoint.name == f"checkpoint-{done:08d}.pt" and not Path(folder, "model").exists()
    run(capsys, *arguments, "--generations", done + 1, "--out", folder, "--resume")
    assert [line["generation"] for line in lines(folder, "metrics.jsonl")] == [*range(1, done + 2)]
    assert lines(folder, "evaluations.jsonl")[-1]["generation"] == done + 1


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        (("--objective", "likelihood", "--answer-key", "wanted"), {"score", "perplexity"}),
        (("--objective", "perplexity", "--max-length", 3), {"score", "perplexity"}),
        ((*FUNCTIONS[2:4], "--chat", "--system", "a", "--compare", "mean", "--report-kl"), {"reward", "kl", "ended"}),
        ((*FUNCTIONS[:2], "--rank", 0, "--optimizer", "adam", "--dtype", "bfloat16"), {"reward", "ended"}),
    ],
)
def test_objectives_and_options(
    options: tuple[object, ...], figures: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(capsys, *SMALL, *options, "--generations", 2, "--adapter-rank", 0, "--out", tmp_path)
    assert [line["generation"] for line in lines(str(tmp_path), "metrics.jsonl")] == [1, 2]
    evaluations = lines(str(tmp_path), "evaluations.jsonl")
    assert all(line.keys() >= figures for line in evaluations)
    assert math.isfinite(evaluations[-1].get("score", 0.0))
    assert (tmp_path / "completions.jsonl").exists() == ("perplexity" not in options)


def test_what_is_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def changed(*options: object) -> set[str]:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        run(capsys, *SMALL, *FUNCTIONS[2:4], *options, "--generations", 1, "--adapter-rank", 0, "--out", folder)
        trained = AutoModelForCausalLM.from_pretrained(folder / "model")
        before = dict(AutoModelForCausalLM.from_pretrained("model").named_parameters())
        return {name for name, p in trained.named_parameters() if not torch.equal(p, before[name])}

    every = {name for name, _ in language_model().named_parameters()}
    vectors = {name for name in every if "norm" in name}
    linear = {name for name in every if "proj" in name}
    assert changed() == linear
    assert changed("--target-modules", "all") == every
    assert changed("--target-modules", "all", "--freeze-nonlora") == every - vectors
    named = ("--target-modules", "q_proj", "mlp", "--exclude-modules", "up_proj")
    assert changed(*named) == {name for name in linear if "q_proj" in name or ("mlp" in name and "up_" not in name)}
    assert changed("--target-modules", r".*\.1\.mlp") == {name for name in linear if "layers.1.mlp" in name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--reward is missing"),
        (("--reward", "eggroll_rewards:nothing"), "'nothing' is no function in eggroll_rewards"),
        (("--reward", "no_such_module:share"), "there is no module 'no_such_module'"),
        (("--reward", "eggroll_rewards:share", "--reward-weights", 1, 2), "got 2"),
        (("--reward", "eggroll_rewards:share", "--prompt-key", "question"), "has no column 'question'"),
        (("--reward", "eggroll_rewards:share", "--data", "short.jsonl"), "needs wanted"),
        (("--reward", "eggroll_rewards:share", "--eval-data", "short.jsonl"), "--eval-data: the reward function share"),
        (("--reward", "eggroll_rewards:share", "--data", "none.csv"), "there is no file none.csv"),
        (("--objective", "likelihood", "--reward", "eggroll_rewards:share"), "--reward is for --objective reward"),
        (("--objective", "likelihood"), "has no column 'answer'"),
        ((*FUNCTIONS, "--eval-every", 0), "eval_every must be at least 1"),
        ((*FUNCTIONS, "--eval-samples", 2), "needs an eval_temperature above 0"),
        ((*FUNCTIONS, "--system", "a"), "add --chat"),
        ((*FUNCTIONS, "--resume"), "no run to resume"),
        ((*FUNCTIONS, "--prompts-per-generation", 100), "prompts_per_generation=100 must be at most the number of"),
        ((*FUNCTIONS, "--target-modules", "attention"), "'attention' matches no module"),
        ((*FUNCTIONS, "--population-size", 7), "population_size"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("short.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    _, errors = run(capsys, *SMALL, *arguments, "--out", tmp_path / "run", status=1)
    assert errors.splitlines()[-1].startswith("eggroll llm: ") and message in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["llm", "no/such/model", "--data", "data.jsonl", *map(str, FUNCTIONS), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "the model 'no/such/model' cannot be loaded" in capsys.readouterr().err


def test_what_a_reward_function_raises_comes_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="what went wrong"):
        main(typed(*SMALL, "--reward", "eggroll_rewards:fails", "--out", tmp_path))


def test_a_folder_that_is_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = (*SMALL, *FUNCTIONS, "--generations", 1, "--adapter-rank", 0, "--out", tmp_path)
    run(capsys, *arguments)
    assert "holds a run already" in run(capsys, *arguments, status=1)[1]
    assert "sigma=0.7 (was 0.1)" in run(capsys, *arguments, "--sigma", 0.7, "--resume", status=1)[1]
    other = "--eval-data", "data.jsonl"
    assert "data_checksum=" in run(capsys, *arguments, *other, "--resume", status=1)[1]


def test_presets_are_defaults() -> None:
    assert [*PRESETS] == [*get_args(Preset)]
    for name, values in PRESETS.items():
        settings = parsed(typed("--preset", name)[1:])
        assert all(getattr(settings, key) == value for key, value in values.items())
        assert parsed(typed(f"--preset={name}", "--sigma", 0.5)[1:]).sigma == 0.5
    assert parsed(typed()[1:]).population_size == 32


def test_the_step_of_es_at_scale() -> None:
    settings = parsed(typed("--preset", "es-at-scale")[1:])
    # θ += α·mean_i(z_i·ε_i) there, θ += lr·√N·mean_i(z_i·σ·ε_i) here.
    alpha = settings.learning_rate * settings.sigma * settings.population_size**0.5
    assert alpha == pytest.approx(0.0005, rel=1e-3)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, default in (((), "32"), (("--preset", "eggroll-countdown"), "256")):
        with contextlib.suppress(SystemExit):
            main(typed(*arguments, "--help"))
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Members in a generation. (default: {default})" in shown
    assert main(["--help"]) == 0 and "eggroll llm MODEL" in capsys.readouterr().out


def test_processes_share_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *RUN, "--generations", 4, "--out", "one")
    out = torchrun(2, "-m", "eggroll_trainer", *typed(*RUN, "--generations", 4, "--out", "two"), modules=MODULES)
    assert out.count("run: ") == out.count("next: ") == 1
    assert lines("two", "metrics.jsonl") == lines("one", "metrics.jsonl") and weights("two") == weights("one")
