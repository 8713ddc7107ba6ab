"""One cluster of Ray's for all tests of a worker, as it takes seconds to start."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray_cluster
from launching import environment


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Start Ray, and yield the variables by which the processes of a test find it."""
    pytest.importorskip("ray")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [sys.executable, ray_cluster.__file__],
        env=environment() | token,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "Ray did not start"
    yield {"RAY_ADDRESS": address, **token}
    # It ends with its input.
    process.communicate(timeout=60)


@pytest.fixture
def ray(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of this test use the cluster."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
