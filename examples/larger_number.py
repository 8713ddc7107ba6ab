"""A language model learns which of two numbers is larger, from a reward that cannot be differentiated.

The reward of a completion is 1 if it is the larger number and nothing else. ``--method es`` trains all weights by
evolution strategies; ``--method grpo`` is a gradient method to compare with: LoRA adapters, trained by the policy
gradient with rewards normalised within each prompt (GRPO without a KL penalty), with as many completions a step.
``--method best-of-8`` trains nothing: it samples eight completions of each prompt of the test.

    python examples/larger_number.py FOLDER --out run.jsonl     # FOLDER: a causal model of transformers
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.llm import CompletionReward

PROMPT = "The larger number:\n12, 57: 57\n83, 31: 83\n{}, {}:"


@dataclasses.dataclass
class Options:
    """What to train and how.

    Attributes:
        model: Folder or name of a causal language model.
        method: Evolution strategies, a policy gradient on LoRA adapters, or samples of the model as it is.
        generations: Updates.
        population: Members, or completions of each prompt where gradients are used.
        prompts: Prompts in a generation.
        sigma: Standard deviation of the perturbations.
        learning_rate: In units of sigma; for ``grpo`` that of Adam. 1 and 0.0003 if None.
        test: Held-out prompts.
        every: Generations between two evaluations.
        seed: Of everything.
        out: Where to write the curve, one JSON object a line.
        smoke: Train for a moment, to see that it runs.
    """

    model: tyro.conf.Positional[str]
    method: Literal["es", "grpo", "best-of-8"] = "es"
    generations: int = 30
    population: int = 32
    prompts: int = 8
    sigma: float = 0.002
    learning_rate: float | None = None
    test: int = 200
    every: int = 5
    seed: int = 0
    out: Path | None = None
    smoke: bool = False


def pairs(count: int, seed: int, avoided: frozenset[tuple[int, int]] = frozenset()) -> list[tuple[int, int]]:
    """Return different pairs of different numbers of two digits, none of the avoided ones in either order."""
    rng = random.Random(seed)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        a, b = rng.sample(range(10, 100), 2)
        if (a, b) not in avoided and (b, a) not in avoided:
            found[a, b] = None
    return list(found)


def examples(of: list[tuple[int, int]]) -> list[dict[str, str]]:
    return [{"prompt": PROMPT.format(a, b), "answer": str(max(a, b))} for a, b in of]


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for each completion that is the answer, else 0."""
    return [float(completion.strip() == own) for completion, own in zip(completions, answer, strict=True)]


def main(options: Options) -> None:
    """Train, and write the share of right answers to prompts that were not trained on."""
    if options.smoke:
        options = dataclasses.replace(options, generations=2, population=4, prompts=2, test=4, every=1)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    held_out = pairs(options.test, seed=12345)
    train = examples(pairs(1000, options.seed, avoided=frozenset(held_out)))
    reward = CompletionReward(
        tokenizer,
        train,
        exact,
        prompts_per_generation=options.prompts,
        max_new_tokens=4,
        # A line is an answer.
        generation_kwargs={"eos_token_id": tokenizer("\n")["input_ids"]},
    )
    if options.method == "best-of-8":
        best_of_eight(model, reward, examples(held_out))
        return
    step = evolution(model, reward, options) if options.method == "es" else policy_gradient(model, reward, options)
    lines = [json.dumps(dataclasses.asdict(options), default=str)]
    start, used = time.perf_counter(), time.process_time()
    bar = tqdm(range(options.generations + 1))
    for generation in bar:
        trained = step() if generation else None
        if generation % options.every == 0:
            spent = time.perf_counter() - start, time.process_time() - used
            result = reward.evaluate(model, examples(held_out))
            bar.set_postfix(exact=result.reward)
            values = {"generation": generation, "exact": result.reward, "train": trained}
            lines.append(json.dumps({**values, "seconds": round(spent[0], 1), "cpu_seconds": round(spent[1], 1)}))
            if options.out is not None:
                options.out.write_text("\n".join(lines) + "\n")
            start, used = time.perf_counter() - spent[0], time.process_time() - spent[1]
    print(f"exact on {options.test} held-out prompts: {json.loads(lines[1])['exact']:.3f} → {result.reward:.3f}")


@torch.no_grad()
def best_of_eight(model: Any, reward: CompletionReward, test: list[dict[str, str]]) -> None:
    """Print what eight samples of the untrained model earn: their mean, the best of them, and the majority."""
    torch.manual_seed(0)
    completer = type(reward.completer)(reward.completer.tokenizer, reward.completer.decoding.at(1.0))
    earned: list[float] = []
    for first in tqdm(range(0, len(test), 25)):
        rows = [example for example in test[first : first + 25] for _ in range(8)]
        completions = completer.by_model(model, [reward.encoder(example["prompt"]) for example in rows], 1)
        earned += exact([c.text for c in completions], [example["answer"] for example in rows])
    table = torch.tensor(earned).view(-1, 8)
    majority = (table.mean(1) > 0.5).float().mean()
    print(
        f"one sample: {table.mean():.3f}, the best of eight: {table.amax(1).mean():.3f}, the majority: {majority:.3f}"
    )


def evolution(model: Any, reward: CompletionReward, options: Options) -> Any:
    """Return a function that makes a step and returns the mean reward."""
    trainer = EGGROLLTrainer(
        model=model,
        fitness_fn=reward,
        population_size=options.population,
        sigma=options.sigma,
        learning_rate=1.0 if options.learning_rate is None else options.learning_rate,
        noise_reuse=2,
        seed=options.seed,
    )
    return lambda: trainer.step()["mean_fitness"]


def policy_gradient(model: Any, reward: CompletionReward, options: Options) -> Any:
    """Return a function that makes a step on LoRA adapters, which are put into the model, and returns the reward."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = 3e-4 if options.learning_rate is None else options.learning_rate
    optimizer = torch.optim.Adam(parameters, lr=rate)
    generation = iter(range(options.generations))

    def step() -> float:
        drawn = reward.examples.drawn(options.prompts, options.seed, next(generation))
        rows = [example for example in drawn for _ in range(options.population)]
        prompts = [reward.encoder(example["prompt"]) for example in rows]
        completer = type(reward.completer)(reward.completer.tokenizer, reward.completer.decoding.at(1.0))
        with torch.no_grad():
            completions = completer.by_model(model, prompts, 1)
        earned = torch.tensor(exact([c.text for c in completions], [example["answer"] for example in rows]))
        grouped = earned.view(options.prompts, -1)
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        optimizer.zero_grad()
        for first in range(0, len(rows), 32):
            part = slice(first, first + 32)
            loss = policy_loss(model, prompts[part], [c.tokens for c in completions[part]], advantages.view(-1)[part])
            (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(earned.mean())

    return step


def policy_loss(model: Any, prompts: list[list[int]], completions: list[list[int]], advantages: Tensor) -> Tensor:
    """Return minus the sum of advantages times log-probabilities of completions."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    ids = torch.tensor([[0] * pad + text for pad, text in zip(padding, texts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    new = torch.tensor([[0] * (longest - len(b)) + [1] * len(b) for b in completions])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    log_probabilities = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return -(advantages[:, None] * new[:, 1:] * log_probabilities).sum()


if __name__ == "__main__":
    main(tyro.cli(Options))
