"""What it costs to run a language model for a population: seconds, tokens a second and memory.

Run it as ``python -m benchmarks.language_models --model FOLDER``, with a causal model of transformers in the folder.
For each number of members ``N``, prompts ``Q`` and new tokens it times, in turns,

- ``plain``: ``generate()`` of the same ``N·Q`` rows with the unperturbed model, the limit;
- ``folded``: the same call inside ``population.folded()``;
- ``together``: a generation of a plain ``fitness_fn`` that calls ``generate()``, with noise and update;
- ``alone``: some members one after the other on dense weights, times ``N`` over their number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from eggroll_trainer import EGGROLLTrainer, Population, batched

from .measure import surroundings, timed

# Members of whom the seconds alone are measured.
_ALONE = 3


def measure(model: Any, case: str, repeats: int, sigma: float) -> dict[str, Any]:
    """Return medians of wall and processor seconds for each way."""
    members, prompts, length, new = map(int, case.split(","))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (prompts, length), generator=generator)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def generate(times: int) -> None:
        rows = ids.repeat(times, 1)
        model.generate(rows, attention_mask=torch.ones_like(rows), **options)

    def fitness(member: Any) -> float:
        tokens = member.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return float(tokens[:, length:].double().mean())

    @batched
    def ranks(population: Population) -> torch.Tensor:
        return torch.arange(float(len(population)))

    settings: dict[str, Any] = {"model": model, "population_size": members, "sigma": sigma, "seed": 0}
    population = next(iter(EGGROLLTrainer(fitness_fn=ranks, chunk_size=members, **settings).ask().chunks()))
    together = EGGROLLTrainer(fitness_fn=fitness, chunk_size=members, **settings)

    def folded() -> None:
        with population.folded(rows=prompts):
            generate(members)

    def alone() -> None:
        for i in range(_ALONE):
            with population.holding(i):
                generate(1)

    runs = {"plain": lambda: generate(members), "folded": folded, "together": together.step, "alone": alone}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with torch.no_grad():
        for i in range(repeats + 1):
            for name, run in runs.items():
                start = time.process_time()
                wall = timed(run)  # type: ignore[arg-type]
                # The first generation together is checked as well; the others are what most are.
                if i:
                    found[name].append((wall, time.process_time() - start))
    factor = {"alone": members / _ALONE}
    medians = {
        name: [statistics.median(column) * factor.get(name, 1) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }
    return {"members": members, "prompts": prompts, "length": length, "new": new, "seconds": medians}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder with a causal model of transformers")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--cases", nargs="+", default=["16,4,46,16", "64,1,46,16"], help="N,Q,length,new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=0.002)
    arguments = parser.parse_args()
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    rows = []
    print("   N   Q length  new     plain   folded together    alone  tokens/s folded")
    for case in arguments.cases:
        row = measure(model, case, arguments.repeats, arguments.sigma)
        rows.append(row)
        wall, plain = {name: value[0] for name, value in row["seconds"].items()}, row["seconds"]["plain"][0]
        shares = " ".join(f"{plain / wall[name]:8.2f}" for name in ("folded", "together", "alone"))
        tokens = row["members"] * row["prompts"] * row["new"] / wall["folded"]
        sizes = f"{row['members']:>4} {row['prompts']:>3} {row['length']:>6} {row['new']:>4}"
        print(f"{sizes}  {plain:7.2f}s {shares}  {tokens:.0f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"surroundings": surroundings(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
