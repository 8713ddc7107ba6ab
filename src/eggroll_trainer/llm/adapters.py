"""Writes changes of a model's weights as a PEFT adapter: two files, which PEFT and servers of LoRA adapters load.

A change ``A Bᵀ`` of a weight becomes the pair of factors that PEFT adds on top of it: ``lora_B · lora_A`` with
``lora_B = A`` and ``lora_A = Bᵀ``. ``lora_alpha = r``, so that loaders multiply by 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# How to handle a change without low-rank factors, such as that of a norm.
FullRank = Literal["error", "save"]

_PREFIX = "base_model.model."


class _Place(NamedTuple):
    """A place where a model stores a parameter: a module's path, the module, and the name in it."""

    path: str
    module: nn.Module
    leaf: str

    @property
    def kind(self) -> str | None:
        """The kind of PEFT layer for low-rank factors here, or None if it has none."""
        if self.leaf != "weight":
            return None
        # Not subclasses, as a user-defined layer may compute something else.
        kinds: dict[type, str] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
        return kinds.get(type(self.module))


@dataclasses.dataclass(frozen=True)
class AdapterWriter:
    """Writes changes of a model's parameters as PEFT adapters.

    Args:
        model: The model that the adapters are for, as ``from_pretrained`` returns it.
        base_model: Folder or name of the unchanged model, for ``base_model_name_or_path``. If None, the one that the
            model was loaded from.
        full_rank: How to handle changes without low-rank factors. ``"error"`` refuses them. ``"save"`` stores norms and
            the like as a whole, among PEFT's ``modules_to_save``; PEFT loads these, servers such as vLLM don't.

    Raises:
        TypeError: ``model`` is not a module, or is a PEFT model, which writes its adapter itself.
        ValueError: ``full_rank`` is neither ``"error"`` nor ``"save"``.
    """

    model: nn.Module
    base_model: str | None = None
    full_rank: FullRank = "error"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if hasattr(self.model, "peft_config"):
            raise TypeError("the model is a PEFT model: save its adapter with model.save_pretrained(folder)")
        if self.full_rank not in ("error", "save"):
            raise ValueError(f'full_rank must be "error" or "save", got {self.full_rank!r}')

    def takes(self, name: str) -> bool:
        """Return whether an adapter can hold a low-rank change of a parameter, given its name."""
        return _holds(_places(self.model)[name])

    def write(
        self,
        folder: str | Path,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        dense: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

        Args:
            folder: Folder to write to. It is created.
            factors: ``A [O, R]`` and ``B [I, R]`` of parameters by name: the change is ``A Bᵀ``, in the parameter's own
                shape ``[O, I]``. Ranks may differ; all are padded with zeros to the largest.
            dense: New values of other parameters by name.

        Returns:
            The folder.

        Raises:
            ValueError: Nothing has changed, or an adapter cannot hold the change of a parameter.
        """
        dense = dense or {}
        if not factors and not dense:
            raise ValueError("there is nothing to write: no parameter has changed")
        if dense and self.full_rank == "error":
            raise ValueError(
                f"low-rank factors cannot hold the changes of {_some(dense)}: train with freeze_nonlora=True, or pass"
                ' full_rank="save" to store norms as a whole'
            )
        places = _places(self.model)
        rank = max((A.shape[1] for A, _ in factors.values()), default=1)
        tensors: dict[str, Tensor] = {}
        targets: set[str] = set()
        for name, (A, B) in factors.items():
            if not _holds(places[name]):
                raise ValueError(
                    f"PEFT has no adapter for {name!r}, a parameter of {_described(places[name])}: don't train it, or"
                    " save merged weights"
                )
            A, B = (nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in (A, B))
            # Each place of a tied parameter gets its own factors. PEFT's ensure_weight_tying stores them once, but with
            # it, a second adapter in the same model computes something else (0.21.2).
            for place in places[name]:
                targets.add(place.path)
                tensors.update(_pair(_PREFIX + place.path, place.kind, A, B))
        saved = {place.path: place.module for name in dense for place in places[name]}
        values = {**dict(self.model.named_parameters(remove_duplicate=False)), **dense}
        for path, module in saved.items():
            parameters = dict(module.named_parameters())
            if any(parameter.ndim > 1 for parameter in parameters.values()):
                raise ValueError(
                    f"an adapter cannot hold the changed {_some(dense)} of {path!r} without its matrix: train with"
                    " freeze_nonlora=True, or save merged weights"
                )
            tensors.update({f"{_PREFIX}{path}.{leaf}": values[f"{path}.{leaf}"] for leaf in parameters})
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Copies, as safetensors refuses tensors that share memory.
        contents = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in tensors.items()
        }
        save_file(contents, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._config(rank, targets, set(saved))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return folder

    def _config(self, rank: int, targets: set[str], saved: set[str]) -> dict[str, Any]:
        modules = dict(self.model.named_modules())
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model or getattr(self.model, "name_or_path", None) or None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": _short_names(targets, list(modules)),
            "modules_to_save": sorted(saved) or None,
            "fan_in_fan_out": any(isinstance(modules.get(path), Conv1D) for path in targets),
        }


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Return all places where the model stores a parameter, by the parameter's name."""
    at: dict[int, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            at.setdefault(id(parameter), []).append(_Place(path, module, leaf))
    return {name: at[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _holds(places: list[_Place]) -> bool:
    """Return whether PEFT has a layer for each place of a parameter."""
    # PEFT replaces a module in one place only, even if the same object is in several.
    return all(place.kind is not None for place in places) and len({id(p.module) for p in places}) == len(places)


def _pair(key: str, kind: str | None, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return PEFT's two factors of the change ``A Bᵀ`` of a weight."""
    if kind == "embedding":
        return {f"{key}.lora_embedding_A": A.mT, f"{key}.lora_embedding_B": B}
    # Conv1D stores its weight as [I, O].
    inner, outer = (A, B) if kind == "conv1d" else (B, A)
    return {f"{key}.lora_A.weight": inner.mT, f"{key}.lora_B.weight": outer}


def _short_names(chosen: set[str], paths: list[str]) -> list[str]:
    """Return the last parts of the chosen paths, such as ``q_proj``, if these match no other paths; else the paths."""
    # Servers expect such short names.
    last = {path.rpartition(".")[2] for path in chosen}
    same = {path for path in paths if path.rpartition(".")[2] in last} == chosen
    return sorted(last if same else chosen)


def _some(names: Mapping[str, Any]) -> str:
    listed = [repr(name) for name in list(names)[:3]]
    return ", ".join(listed) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _described(places: list[_Place]) -> str:
    return " and ".join(f"{place.path or 'the model'} ({type(place.module).__name__})" for place in places)
