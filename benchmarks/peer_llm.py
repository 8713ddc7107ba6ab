"""A generation of a language model, ours and that of ``eggroll-es``: ``python -m benchmarks.peer_llm MODEL``.

``eggroll-es`` 0.2.0 (``pip install --no-deps eggroll-es``) perturbs a Hugging Face model by low-rank matrices that it
forms in full, and evaluates members one after the other. Both do one generation with the same members, prompts and
tokens, once with a score of given texts (perplexity, one forward a member) and once with greedy completions. They take
turns; the first of each is not counted. ``eggroll-es`` holds the perturbations of all members in full: 16 members of
SmolLM2-135M do not fit into 23 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eggroll_trainer import EGGROLLTrainer, Population, batched

from .measure import surroundings, timed

MEMBERS, PROMPTS, LENGTH, NEW, RANK, SIGMA = 8, 4, 46, 16, 1, 0.002


def ours(model: Any, score: Callable[[Population], torch.Tensor]) -> Callable[[], object]:
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=batched(score), population_size=MEMBERS, rank=RANK, sigma=SIGMA, noise_reuse=2, seed=0
    )
    return trainer.step


def theirs(model: Any, score: Callable[[Any, Any], float], ids: torch.Tensor) -> Callable[[], object]:
    from eggroll import EggrollConfig, EggrollTrainer

    config = EggrollConfig(population_size=MEMBERS, rank=RANK, sigma=SIGMA, generations=1, device="cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = EggrollTrainer(model, config, score)

    def generation() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.evolve([ids])

    return generation


def main() -> None:
    """Measure and print seconds a generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder with a causal model of transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    import transformers

    def loaded() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()

    vocabulary = transformers.AutoConfig.from_pretrained(arguments.model).vocab_size
    ids = torch.randint(10, vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def negative_perplexity(logits: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return -losses.mean().exp()

    def perplexities(population: Population) -> torch.Tensor:
        with torch.no_grad(), population.folded(rows=PROMPTS) as model:
            logits = model(input_ids=ids.repeat(len(population), 1), use_cache=False).logits
        return torch.stack([negative_perplexity(own) for own in logits.unflatten(0, (len(population), -1))])

    def completions(population: Population) -> torch.Tensor:
        rows = ids.repeat(len(population), 1)
        with torch.no_grad(), population.folded(rows=PROMPTS) as model:
            generating: Any = model
            tokens = generating.generate(rows, attention_mask=torch.ones_like(rows), **options)
        return tokens[:, LENGTH:].double().view(len(population), -1).mean(1)

    def perplexity(model: Any, inputs: torch.Tensor) -> float:
        return -math.exp(float(model(input_ids=inputs, labels=inputs, use_cache=False).loss))

    def completion(model: Any, inputs: torch.Tensor) -> float:
        tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return float(tokens[:, LENGTH:].double().mean())

    seconds: dict[str, list[float]] = {}
    for task, score, peer_score in (
        ("perplexity", perplexities, perplexity),
        ("completions", completions, completion),
    ):
        # Made anew for each task: both at once would need twice the memory.
        runs = {
            f"{task}, ours": ours(loaded(), score),
            f"{task}, eggroll-es": theirs(loaded(), peer_score, ids),
        }
        for i in range(arguments.repeats + 1):
            for name, run in runs.items():
                spent = timed(run)
                if i:
                    seconds.setdefault(name, []).append(spent)
        del runs, run
    for name, values in seconds.items():
        print(f"{name:24} {statistics.median(values):7.1f} s a generation ({min(values):.1f} to {max(values):.1f})")
    if arguments.out:
        arguments.out.write_text(json.dumps({"surroundings": surroundings(), "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
