"""Writes members of a population as PEFT adapters, for a server that evaluates them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..population import WholePopulation
from .adapters import AdapterWriter, FullRank


def write_adapters(
    population: WholePopulation,
    folder: str | Path,
    members: Iterable[int] | None = None,
    *,
    base_model: str | None = None,
    full_rank: FullRank = "error",
) -> list[Path]:
    """Write members as PEFT adapters, one folder each, for evaluation by a server of LoRA adapters.

    **For a PEFT model**, ``peft.get_peft_model(base, …)``, the member's adapter is written, as PEFT saves it. The base
    model never changes, so a server keeps it loaded. Choose this if a server evaluates members.

    **For any other model**, the member is the *current* centre plus the adapter; its logits are equal up to rounding. A
    perturbation ``scale·A Bᵀ`` becomes ``lora_B = scale·A`` and ``lora_A = Bᵀ``, at the trainer's rank. Each step moves
    the centre, so the server needs the new centre before the next generation (``save_merged``). Perturb only matrices
    (``freeze_nonlora=True``) and leave embeddings out, as most servers do not support changes of other parameters.

    Args:
        population: The population that ``trainer.ask()`` has returned.
        folder: Folder to write to. The folders in it are named by generation and member, such as
            ``generation-12-member-3``. So a server that identifies adapters by name never confuses two of them.
        members: Indices of the members; all if None.
        base_model: Folder or name of the unchanged model, which is stored in the adapters. If None, the one that the
            model was loaded from.
        full_rank: ``"error"`` refuses perturbed norms and biases. ``"save"`` stores norms as a whole, among PEFT's
            ``modules_to_save``, which PEFT loads but most servers don't.

    Returns:
        The folders, in the order of the members.

    Raises:
        TypeError: ``population`` is of another type.
        IndexError: A member is not in the population.
        ValueError: An adapter cannot hold the perturbation of a parameter.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> sizes = dict(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
        >>> trainer = EGGROLLTrainer(
        ...     model=model, fitness_fn=lambda model: 0.0, population_size=4, freeze_nonlora=True, seed=0
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_adapters(trainer.ask(), folder, members=[0, 3])]
        ['generation-1-member-0', 'generation-1-member-3']
    """
    if not isinstance(population, WholePopulation):
        raise TypeError(f"population must be what trainer.ask() returns, got {type(population).__name__}")
    chosen = range(len(population)) if members is None else list(members)
    model: Any = population.model
    has_adapter = hasattr(model, "peft_config")
    writer = None if has_adapter else AdapterWriter(model, base_model, full_rank)
    paths = []
    for member in chosen:
        path = Path(folder) / f"generation-{population.generation + 1}-member-{member}"
        if writer is None:
            with population.holding(member):
                model.save_pretrained(path)
        else:
            factors, dense = _changes(population, member, writer)
            writer.write(path, factors, dense)
        paths.append(path)
    return paths


def _changes(
    population: WholePopulation, member: int, writer: AdapterWriter
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return the factors of a member's perturbations, with the scale in ``A``, and its other parameters."""
    factors = {name: (A * A.new_tensor(scale), B) for name, (A, B, scale) in population.lora(member).items()}
    others = [name for name in population.names if name not in factors]
    dense = population.member_parameters(member, others)
    # Matrices that are perturbed at full rank, as they are smaller than their factors would be.
    small = [name for name, value in dense.items() if value.ndim == 2 and writer.takes(name)]
    centres = dict(population.model.named_parameters(remove_duplicate=False))
    for name in small:
        factors[name] = _exact(dense.pop(name) - centres[name].detach())
    return factors, dense


def _exact(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A [O, R]`` and ``B [I, R]`` with ``A Bᵀ = change [O, I]`` and ``R = min(O, I)``."""
    O, I = change.shape
    identity = torch.eye(min(O, I), dtype=change.dtype, device=change.device)
    return (change, identity) if O >= I else (identity, change.mT)
