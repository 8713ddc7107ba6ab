"""A small server of a language model with many LoRA adapters, loaded and unloaded while it runs, by PEFT.

    python examples/adapter_server.py MODEL --port 8000

It speaks as much of vLLM's HTTP interface as ``examples/train_on_server.py`` needs, which works with either:

    POST /v1/load_lora_adapter    {"lora_name": …, "lora_path": …}
    POST /v1/unload_lora_adapter  {"lora_name": …}
    POST /v1/completions          {"model": …, "prompt": [...], "max_tokens": …, "temperature": …}
    GET  /v1/models

Adapters are read from the server's own disk, by whatever path a client names: let nobody else reach its port.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclasses.dataclass
class Args:
    model: tyro.conf.Positional[str]
    """Folder or name of the base model."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 for a free one; the first line that is printed says which."""
    max_adapters: int = 8
    """How many may be loaded at a time."""


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, temperature: float = 0.0
) -> list[str]:
    """Return a completion of each prompt, without special tokens; greedy at temperature 0."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    completions: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


class UserError(Exception):
    """A request that cannot be served: the status 400 and a message."""


class Models:
    """A base model and its adapters, by name."""

    def __init__(self, base: str, max_adapters: int) -> None:
        self.base, self.max_adapters = base, max_adapters
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
        self.adapters: set[str] = set()

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        name, path = request["lora_name"], request["lora_path"]
        if name in self.adapters or name == self.base:
            raise UserError(f"an adapter {name!r} is loaded already: give one with other weights another name")
        if len(self.adapters) == self.max_adapters:
            raise UserError(f"{self.max_adapters} adapters are loaded, and there is no room for more: unload one")
        if not (Path(path) / "adapter_config.json").exists():
            raise UserError(f"there is no adapter in {path!r}")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
        self.adapters.add(name)
        return {"loaded": name}

    def unload(self, request: dict[str, Any]) -> dict[str, Any]:
        self._check(request["lora_name"])
        self.adapters.remove(request["lora_name"])
        if self.adapters:
            self.model.delete_adapter(request["lora_name"])
        else:
            # The base model as it was: PEFT wants to know of one adapter at least.
            self.model = self.model.unload()
        return {"unloaded": request["lora_name"]}

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        prompts = request["prompt"] if isinstance(request["prompt"], list) else [request["prompt"]]
        options = self.tokenizer, prompts, request.get("max_tokens", 16), request.get("temperature", 0.0)
        if request["model"] != self.base:
            self._check(request["model"])
            self.model.set_adapter(request["model"])
            texts = complete(self.model, *options)
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                texts = complete(self.model, *options)
        else:
            texts = complete(self.model, *options)
        return {"model": request["model"], "choices": [{"index": i, "text": text} for i, text in enumerate(texts)]}

    def listed(self) -> dict[str, Any]:
        return {"data": [{"id": name} for name in [self.base, *sorted(self.adapters)]]}

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            raise UserError(f"no adapter {name!r} is loaded")


def serve(models: Models, host: str, port: int) -> None:
    posts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "/v1/load_lora_adapter": models.load,
        "/v1/unload_lora_adapter": models.unload,
        "/v1/completions": models.complete,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(200, models.listed())
            else:
                self.answer(404, {"error": f"there is nothing at {self.path}"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            function = posts.get(self.path)
            if function is None:
                self.answer(404, {"error": f"there is nothing at {self.path}"})
                return
            try:
                self.answer(200, function(json.loads(body)))
            except UserError as error:
                self.answer(400, {"error": str(error)})
            except (KeyError, ValueError) as error:
                self.answer(400, {"error": f"{type(error).__name__}: {error}"})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of each request."""

    # One request after the other: the model has one active adapter at a time.
    with HTTPServer((host, port), Handler) as server:
        print(f"serving {models.base} on http://{host}:{server.server_port}", flush=True)
        server.serve_forever()


def main(args: Args) -> None:
    # PEFT warns of what transformers has deprecated, at every adapter.
    warnings.simplefilter("ignore")
    serve(Models(args.model, args.max_adapters), args.host, args.port)


if __name__ == "__main__":
    main(tyro.cli(Args))
