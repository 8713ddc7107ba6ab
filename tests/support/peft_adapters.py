"""Adapters, loaded by PEFT."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore what PEFT warns of: adapters on tied weights, and names that transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(base: Any, *folders: Path) -> Any:
    """Load adapters into one copy of a model; each is named by its folder, and the first is active."""
    import peft

    first, *others = folders
    with quiet():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), first, adapter_name=first.name).eval()
        for folder in others:
            model.load_adapter(folder, folder.name)
    return model
