"""One cluster of Ray's for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray_cluster


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
