"""Exports the result of a run: merged weights, or the sum of all updates as a PEFT adapter."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ESTrainer
from .._utils.validation import check_int
from ..trainers.best import holding
from .adapters import AdapterWriter, FullRank

# Takes a model and returns its score.
Evaluate = Callable[[nn.Module], float]


def weights_of(trainer: ESTrainer) -> dict[str, Tensor]:
    """Return the trained parameters by name, in float32 or wider. For a bf16 model, these are the float32 masters.

    Example:
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> model = torch.nn.Linear(2, 1)
        >>> trainer = EGGROLLTrainer(model=model, fitness_fn=lambda m: m(torch.ones(1, 2)).item(), seed=0)
        >>> _ = trainer.step()
        >>> torch.equal(weights_of(trainer)["weight"], model.weight)
        True
    """
    return _by_name(trainer, trainer.current_params)


def changes_of(trainer: ESTrainer) -> dict[str, Tensor]:
    """Return the changes of trained parameters since the beginning, by name, in float32 or wider.

    Example:
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> model = torch.nn.Linear(2, 1)
        >>> trainer = EGGROLLTrainer(model=model, fitness_fn=lambda m: m(torch.ones(1, 2)).item(), seed=0)
        >>> _ = trainer.step()
        >>> {name: list(change.shape) for name, change in changes_of(trainer).items()}
        {'weight': [1, 2], 'bias': [1]}
    """
    return _by_name(trainer, trainer.current_params - trainer.initial_params)


def _by_name(trainer: ESTrainer, flat: Tensor) -> dict[str, Tensor]:
    named = [pair for group in trainer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    trained = {name: p for name, p in named if p.requires_grad}
    if sum(p.numel() for p in trained.values()) != len(flat):
        raise ValueError(
            "parameters were frozen or unfrozen during the run: pass changes and weights that you compute yourself"
        )
    parts = flat.split([p.numel() for p in trained.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(trained.items(), parts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Merged:
    """A model that was saved with its trained weights.

    Attributes:
        folder: Folder of the model.
        dtype: Dtype of the saved weights.
        score: The score of the model in memory, by ``evaluate``; None without it.
        score_saved: The score of the saved model, loaded again.
    """

    folder: Path
    dtype: torch.dtype
    score: float | None = None
    score_saved: float | None = None


def save_merged(
    model: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
) -> Merged:
    """Save a model of transformers with its trained weights by ``save_pretrained``, rounded to ``dtype``.

    Updates of evolution strategies are small: bf16 has 8 significant bits, and may round them away. Pass ``evaluate``
    to see the effect of rounding.

    Args:
        model: The trained model, or a PEFT model, whose adapters are merged.
        folder: Folder to write to.
        dtype: ``torch.float32``, or ``torch.bfloat16`` for half the size; the model's own if None.
        weights: Values to save instead of the model's, by name: ``weights_of(trainer)`` for the float32 masters of a
            bf16 model.
        tokenizer: A tokenizer to save with the model, or None.
        evaluate: A function from a model to its score, such as ``trainer.evaluate_fitness``. It is called with the
            model in memory, and with the saved model, loaded from ``folder``.

    Returns:
        The folder of the model, and the scores.

    Raises:
        ValueError: The adapters of a PEFT model are on tied weights, which PEFT merges twice, or ``weights`` has a name
            that the model does not have.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(model, folder, dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    score = None if evaluate is None else float(evaluate(model))
    merged = copy.deepcopy(model)
    if hasattr(model, "peft_config"):
        _check_merge(model)
        merged = merged.merge_and_unload()
    dtype = merged.dtype if dtype is None else dtype
    merged.to(dtype)
    with torch.no_grad():
        parameters = dict(merged.named_parameters())
        for name, value in (weights or {}).items():
            if name not in parameters:
                raise ValueError(f"weights: the merged model has no parameter {name!r}")
            parameters[name].copy_(value)
    merged.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if evaluate is None:
        return Merged(Path(folder), dtype)
    # Evaluate the model from the disk, as users will load it.
    loaded = type(merged).from_pretrained(folder, dtype=dtype).to(merged.device)
    return Merged(Path(folder), dtype, score, float(evaluate(loaded)))


def _check_merge(model: nn.Module) -> None:
    layers = [getattr(module, "base_layer", None) for module in model.modules()]
    counts = Counter(id(p) for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters())
    if max(counts.values(), default=0) > 1:
        raise ValueError(
            "there are adapters on an embedding and on the output layer that is tied to it: PEFT's merge_and_unload"
            " adds both to the shared weight. Save the adapter instead, with model.save_pretrained(folder)"
        )


@dataclasses.dataclass(frozen=True)
class Update:
    """The sum of all updates as an adapter.

    Attributes:
        folder: Folder of the adapter.
        rank: ``k``.
        energy: For each matrix, the share of the squared norm of its change that rank ``k`` keeps, in [0, 1].
        total: The same for all matrices together.
        score: The score of the trained model, by ``evaluate``; None without it.
        score_kept: The score of the initial weights plus the adapter.
    """

    folder: Path
    rank: int
    energy: dict[str, float]
    total: float
    score: float | None = None
    score_kept: float | None = None

    def __str__(self) -> str:
        """Return the share of energy kept in total and in each matrix, the smallest first."""
        lines = [f"rank {self.rank} keeps {self.total:.1%} of the change's energy"]
        if self.score is not None:
            lines.append(f"score {self.score:.4g} of the trained model, {self.score_kept:.4g} of the adapter")
        lines += [f"{share:7.1%}  {name}" for name, share in sorted(self.energy.items(), key=lambda item: item[1])]
        return "\n".join(lines)


def write_update(
    model: nn.Module,
    changes: Mapping[str, Tensor],
    folder: str | Path,
    *,
    rank: int = 16,
    base_model: str | None = None,
    full_rank: FullRank = "error",
    evaluate: Evaluate | None = None,
) -> Update:
    """Write the changes of training as a PEFT adapter of rank ``k`` for the initial model, for any LoRA server.

    The sum of many low-rank updates has full rank. Each change ``ΔW [O, I]`` is replaced by its best approximation of
    rank ``k``, ``ΔW V Vᵀ`` with ``V`` its first ``k`` right singular vectors, so a part of the change is lost. Look at
    :attr:`Update.total`, and pass ``evaluate``: directions with little energy may contribute much to the score.

    Args:
        model: The trained model.
        changes: Trained minus initial weights by name, ``changes_of(trainer)``.
        folder: Folder to write to.
        rank: ``k``. vLLM supports up to 512, and reserves memory for its largest configured rank.
        base_model: Folder or name of the initial model, which is stored in the adapter. If None, the one that the model
            was loaded from.
        full_rank: ``"error"`` refuses changed norms and biases. ``"save"`` stores norms as a whole, among PEFT's
            ``modules_to_save``.
        evaluate: A function from a model to its score, such as ``trainer.evaluate_fitness``. It is called with the
            trained model, and with the initial weights plus the adapter.

    Returns:
        The shares of energy kept, and the scores.

    Raises:
        TypeError: ``rank`` is not an integer, or ``model`` is a PEFT model.
        ValueError: ``rank`` is less than 1, nothing has changed, or an adapter cannot hold the change of a parameter.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> sizes = dict(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
        >>> ids = torch.tensor([[1, 5, 7]])
        >>> trainer = EGGROLLTrainer(
        ...     model=model,
        ...     fitness_fn=lambda model: model(ids, use_cache=False).logits.mean().item(),
        ...     population_size=4,
        ...     freeze_nonlora=True,
        ...     seed=0,
        ... )
        >>> _ = trainer.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     round(write_update(model, changes_of(trainer), folder, rank=4).total, 3)  # four members: of rank 4
        1.0
    """
    rank = check_int("rank", rank, 1)
    writer = AdapterWriter(model, base_model, full_rank)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved = {name: change for name, change in changes.items() if bool(change.any())}
    factors, dense, kept, all_energy = {}, {}, {}, {}
    for name, change in moved.items():
        if change.ndim < 2:
            dense[name] = parameters[name].detach()
        else:
            A, B, kept[name], all_energy[name] = _truncated(change, rank)
            factors[name] = A.to(change), B.to(change)
    path = writer.write(folder, factors, dense)
    energy = {name: kept[name] / all_energy[name] for name in kept}
    total = sum(kept.values()) / sum(all_energy.values()) if kept else 1.0
    if evaluate is None:
        return Update(path, rank, energy, total)
    score = float(evaluate(model))
    values = {
        name: parameters[name].detach().to(change) - change + (A @ B.mT).view(change.shape)
        for (name, (A, B)), change in ((item, moved[item[0]]) for item in factors.items())
    }
    with holding(model, values):
        return Update(path, rank, energy, total, score, float(evaluate(model)))


def _truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the factors of the best approximation of a rank, its squared norm, and that of the change."""
    # In float64, as eigenvalues are squares of singular values. MPS has no float64.
    D = change.to("cpu" if change.device.type == "mps" else change.device, torch.float64).flatten(1)
    tall = D if D.shape[0] >= D.shape[1] else D.mT
    _, vectors = torch.linalg.eigh(tall.mT @ tall)
    V = vectors[:, -rank:].flip(1)
    projected = tall @ V
    A, B = (projected, V) if tall is D else (V, projected)
    return A, B, projected.square().sum().item(), D.square().sum().item()
