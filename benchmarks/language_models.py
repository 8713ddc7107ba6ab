"""What it costs to run a language model for a population: seconds, tokens a second and memory.

Run it as ``python -m benchmarks.language_models --model FOLDER``, with a causal model of transformers in the folder.
For each number of members ``N``, prompts ``Q`` and new tokens it times, in turns,

- ``plain``: ``generate()`` of the same ``N·Q`` rows with the unperturbed model, the limit;
- ``folded``: the same call inside ``population.folded()``;
- ``together``: a generation of a plain ``fitness_fn`` that calls ``generate()``, with noise and update;
- ``checked``: the same where one member is checked too, as in generations 2, 4, 8 and so on;
- ``alone``: some members one after the other on dense weights, times ``N`` over their number.

With ``--memory`` it measures instead the most memory above that of the model, each in a process of its own, for the
first two and for ``generation``: a whole one with folded rows, with noise and update.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eggroll_trainer import EGGROLLTrainer, Population, batched

from .measure import in_new_process, peak_memory, settled_memory, surroundings, timed

# Members of whom the seconds alone are measured.
_ALONE = 3


@dataclasses.dataclass
class Case:
    """A model, ``members`` with ``prompts`` of ``length`` tokens each, and ``new`` tokens to generate."""

    model: Any
    members: int
    prompts: int
    length: int
    new: int
    sigma: float

    @classmethod
    def parse(cls, model: Any, text: str, sigma: float) -> Case:
        """Return the case of ``N,Q,length,new``."""
        members, prompts, length, new = map(int, text.split(","))
        return cls(model, members, prompts, length, new, sigma)

    def generate(self, times: int, model: Any = None) -> torch.Tensor:
        """Complete the prompts of so many members, and return the new tokens."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(10, vocabulary, (self.prompts, self.length), generator=generator).repeat(times, 1)
        options = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            tokens = (self.model if model is None else model).generate(
                ids, attention_mask=torch.ones_like(ids), **options
            )
        return tokens[:, self.length :]

    def fitness(self, member: Any) -> float:
        """The plain function."""
        return float(self.generate(1, member).double().mean())

    def folded(self, population: Population) -> torch.Tensor:
        """The function of a population, with folded rows."""
        with population.folded(rows=self.prompts):
            return self.generate(len(population)).double().reshape(len(population), -1).mean(1)

    def trainer(self, fitness_fn: Any) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model=self.model,
            fitness_fn=fitness_fn,
            population_size=self.members,
            chunk_size=self.members,
            sigma=self.sigma,
            seed=0,
        )

    def population(self) -> Population:
        return next(iter(self.trainer(batched(self.folded)).ask().chunks()))

    def alone(self, population: Population) -> None:
        """Run some members one after the other."""
        for i in range(_ALONE):
            with population.holding(i):
                self.generate(1)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Return medians of wall and processor seconds for each way."""
    population, together = case.population(), case.trainer(case.fitness)
    together.step()
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: case.generate(case.members),
        "folded": lambda: case.folded(population),
        "checked": together.step,
        "together": together.step,
        "alone": lambda: case.alone(population),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            # There is a check if the number of the next generation is a power of two.
            if name == "checked" and together.generation & (together.generation + 1):
                continue
            start = time.process_time()
            wall = timed(run)
            # The first turn is for warming up.
            if i or name == "checked":
                found[name].append((wall, time.process_time() - start))
    factor = {"alone": case.members / _ALONE}
    medians = {
        name: [statistics.median(column) * factor.get(name, 1) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }
    sizes = {"members": case.members, "prompts": case.prompts, "length": case.length, "new": case.new}
    return {**sizes, "seconds": medians}


def memory(case: Case, way: str) -> int:
    """Return the most bytes above what the process holds before, trainer included."""
    run: Callable[[], object]
    if way == "plain":
        run = functools.partial(case.generate, case.members)
    elif way == "folded":
        run = functools.partial(case.folded, case.population())
    else:
        run = case.trainer(batched(case.folded)).step
    # The weights are read from the file when they are first used.
    case.generate(1)
    held = settled_memory()
    run()
    return peak_memory() - held


def caches(case: Case) -> int:
    """Return the bytes of the keys and values of all rows and tokens."""
    config = case.model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * 4 * case.members * case.prompts * (case.length + case.new)


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder with a causal model of transformers")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--cases", nargs="+", default=["16,4,46,16", "64,1,46,16"], help="N,Q,length,new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=0.002)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    cases = [Case.parse(model, case, arguments.sigma) for case in arguments.cases]
    if arguments.way:
        print(memory(cases[0], arguments.way))
    elif arguments.memory:
        print("   N   Q length  new  caches   plain  folded generation, GB above the model and the trainer")
        for case, sizes in zip(cases, arguments.cases, strict=True):
            options = ("--model", arguments.model, "--sigma", arguments.sigma, "--cases", sizes, "--way")
            peaks = [int(in_new_process(__spec__.name, *options, way)) for way in ("plain", "folded", "generation")]
            print(_sizes(case), " ".join(f"{bytes_ / 1e9:7.2f}" for bytes_ in (caches(case), *peaks)), flush=True)
    else:
        times(cases, arguments.repeats, arguments.out)


def times(cases: list[Case], repeats: int, out: Path | None) -> None:
    rows = []
    print("   N   Q length  new     plain   folded together  checked    alone  tokens/s folded")
    for case in cases:
        row = measure(case, repeats)
        rows.append(row)
        wall, plain = {name: value[0] for name, value in row["seconds"].items()}, row["seconds"]["plain"][0]
        shares = " ".join(f"{plain / wall[name]:8.2f}" for name in ("folded", "together", "checked", "alone"))
        tokens = case.members * case.prompts * case.new / wall["folded"]
        print(f"{_sizes(case)}  {plain:7.2f}s {shares}  {tokens:.0f}", flush=True)
        if out:
            out.write_text(json.dumps({"surroundings": surroundings(), "rows": rows}, indent=1) + "\n")


def _sizes(case: Case) -> str:
    return f"{case.members:>4} {case.prompts:>3} {case.length:>6} {case.new:>4}"


if __name__ == "__main__":
    main()
