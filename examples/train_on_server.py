"""Train a language model whose population is evaluated by a server with LoRA support, over HTTP.

    python examples/train_on_server.py --smoke    # a tiny random model, and a server of its own

    python examples/adapter_server.py MODEL --port 8000    # or vLLM, see below
    python examples/train_on_server.py --model MODEL --url http://127.0.0.1:8000

What is trained is an adapter of PEFT. Its base never changes, so the server keeps what it has loaded, and each member
is an adapter too: this script writes it to a folder that the server can read, has it loaded, asks for completions, and
tells the trainer the scores. Here the reward is the share of digits in a completion; yours replaces ``reward``.

vLLM has to be told how large adapters are, and that they may be exchanged:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-loras 8 --max-lora-rank 8
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import string
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.llm import write_adapters

PROMPTS = ["Count: ", "1 and 2 make ", "My phone number is ", "Digits only: "]


@dataclasses.dataclass
class Args:
    model: str = ""
    """Folder or name of the base model, the one that the server has."""
    url: str = "http://127.0.0.1:8000"
    folder: Path = Path("runs/on_server")
    """Where members' adapters and the trained one are written; the server reads them there."""
    generations: int = 20
    population_size: int = 32
    adapter_rank: int = 8
    """Rank of the trained adapter."""
    sigma: float = 0.02
    learning_rate: float = 1.0
    max_tokens: int = 16
    """Of a completion."""
    at_a_time: int = 8
    """Adapters loaded at a time: no more than the server's limit."""
    seed: int = 0
    smoke: bool = False
    """Make a tiny random model in the folder, and start examples/adapter_server.py with it."""


def reward(completion: str) -> float:
    return sum(character in string.digits for character in completion) / max(1, len(completion))


class Client:
    """What the server at ``url`` is asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    def load(self, name: str, path: Path) -> None:
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(path.resolve())})

    def unload(self, name: str) -> None:
        self._post("unload_lora_adapter", {"lora_name": name})

    def complete(self, name: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        request = {"model": name, "prompt": list(prompts), "max_tokens": max_tokens, "temperature": 0.0}
        choices = json.loads(self._post("completions", request))["choices"]
        return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _post(self, what: str, content: dict[str, Any]) -> bytes:
        # vLLM answers some of these in plain text.
        request = urllib.request.Request(
            f"{self.url}/v1/{what}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{what}: {error.code} {error.read().decode()}") from error


def evaluate(client: Client, adapter: Path, max_tokens: int) -> float:
    """Return the mean reward of one member."""
    # The name is new for every member of every generation: servers keep what they have computed by name.
    client.load(adapter.name, adapter)
    try:
        completions = client.complete(adapter.name, PROMPTS, max_tokens)
    finally:
        client.unload(adapter.name)
    return sum(map(reward, completions)) / len(completions)


def make_trainer(args: Args) -> EGGROLLTrainer:
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    config = LoraConfig(r=args.adapter_rank, lora_alpha=args.adapter_rank, target_modules="all-linear")
    # The trainer's own fitness function is not called.
    return EGGROLLTrainer(
        model=get_peft_model(base, config).eval(), fitness_fn=reward, population_size=args.population_size,
        noise_reuse=2, sigma=args.sigma, learning_rate=args.learning_rate, seed=args.seed,
    )  # fmt: skip


def train(args: Args) -> list[list[float]]:
    """Train an adapter, save it in ``args.folder / "adapter"``, and return the scores of every generation."""
    client, trainer, history = Client(args.url), make_trainer(args), []
    for _ in range(args.generations):
        adapters = write_adapters(trainer.ask(), args.folder / "members")
        with ThreadPoolExecutor(args.at_a_time) as pool:
            scores = list(pool.map(lambda adapter: evaluate(client, adapter, args.max_tokens), adapters))
        shutil.rmtree(args.folder / "members")
        metrics = trainer.tell(scores)
        assert metrics is not None, "all members were told of"
        print(f"generation {metrics['generation']}: mean reward {metrics['mean_fitness']:.3f}", flush=True)
        history.append(scores)
    model: Any = trainer.model
    model.save_pretrained(args.folder / "adapter")
    (args.folder / "scores.json").write_text(json.dumps(history))
    return history


def make_tiny_model(folder: Path) -> None:
    """Write a random model of single characters, with its tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["<pad>", "<end>", *string.digits, *string.ascii_letters, *" .,:?"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@contextlib.contextmanager
def server(model: Path, max_adapters: int) -> Iterator[str]:
    """Run examples/adapter_server.py in a process of its own, and yield its address."""
    script = Path(__file__).with_name("adapter_server.py")
    command = [sys.executable, str(script), str(model), "--port", "0", "--max-adapters", str(max_adapters)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http" not in line:
                raise RuntimeError("the server did not start")
            yield line.split()[-1]
        finally:
            process.terminate()


def main(args: Args) -> None:
    # PEFT warns of what transformers has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not args.smoke:
        train(args)
        return
    model = args.folder / "model"
    make_tiny_model(model)
    with server(model, args.at_a_time) as url:
        train(dataclasses.replace(args, model=str(model), url=url, sigma=0.1))


if __name__ == "__main__":
    main(tyro.cli(Args))
