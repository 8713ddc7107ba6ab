"""The device that the tests run on: ``EGGROLL_TEST_DEVICE=cuda make test``; and Ray, for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray_cluster
import torch

DEVICE = os.environ.get("EGGROLL_TEST_DEVICE")
if DEVICE is not None:
    # Before the test modules make their data.
    torch.set_default_device(DEVICE)


@pytest.fixture(scope="session")
def cluster() -> Iterator[ray_cluster.Cluster]:
    pytest.importorskip("ray")
    with ray_cluster.started() as cluster:
        yield cluster


@pytest.fixture
def ray(cluster: ray_cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of this test use the cluster."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
