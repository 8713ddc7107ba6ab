"""What tests of compiled forwards share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from eggroll_trainer.population import forward


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile without its code generation: what is traced, and how often, is the same, and takes no time."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(forward.Backend, "inner", staticmethod(backend))
    yield graphs
    torch._dynamo.reset()
