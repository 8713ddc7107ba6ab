"""A run shared by processes has the bits of one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import language_model, tokenizer
from launching import torchrun

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.llm import CompletionReward


def words(completions: Any, **_: Any) -> list[int]:
    return [len(set(text.split())) for text in completions]


def run() -> tuple[EGGROLLTrainer, dict[str, Any]]:
    """Train a little by sampled completions; returns the trainer and what came of it."""
    reward = CompletionReward(
        tokenizer(),
        ["a b", "c", "d e f"],
        words,
        prompts_per_generation=2,
        max_new_tokens=6,
        temperature=1.0,
        samples_per_prompt=2,
    )
    trainer = EGGROLLTrainer(
        model=language_model(dtype=torch.float32),
        fitness_fn=reward,
        population_size=8,
        chunk_size=2,
        noise_reuse=2,
        anchor_decay=0.5,
        seed=0,
    )
    trainer.train(3, verbose=False)
    return trainer, {"checksum": trainer.checksum(), "metrics": reward.metrics, "tokens": reward.tokens}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    trainer, found = run()
    assert trainer.engine.size == 2
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, expected = run()
    finally:
        torch.set_num_threads(threads)
    torchrun(2, __file__, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


if __name__ == "__main__":
    main(sys.argv[1])
