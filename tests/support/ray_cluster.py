"""A cluster of Ray's on this machine, and a driver of it with an engine: both stay while tests come and go.

Ray takes seconds to start, and so does each of its workers, as it imports torch.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from forking import Forked
from launching import start

WORKERS = 2


class Cluster:
    """A running cluster.

    Attributes:
        variables: Of the environment, by which other processes find it.
    """

    def __init__(self, driver: Forked, variables: dict[str, str]) -> None:
        self._driver, self.variables = driver, variables

    def run(self, folder: Path, body: str) -> list[str]:
        """Run a script in the driver, where ``ENGINE`` is one of two workers, and return the lines that it printed."""
        path = folder / "script.py"
        path.write_text(body)
        print(path, file=self._driver.stdin, flush=True)
        answer = self._driver.stdout.readline().strip()
        printed = path.with_suffix(".out").read_text()
        assert answer == "done", printed
        return printed.splitlines()


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """Start a cluster, which ends with the block."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with start(__file__, variables=token, errors=2) as driver:
        address = driver.stdout.readline().strip()
        assert address, "Ray did not start"
        yield Cluster(driver, {"RAY_ADDRESS": address, **token})
        driver.communicate(timeout=60)


def serve() -> None:
    """Run the scripts that standard input names, and say after each how it went."""
    import ray
    import torch

    from eggroll_trainer.distributed import RayEngine

    torch.set_num_threads(1)
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    print(ray.get_runtime_context().gcs_address, flush=True)
    engine = None
    for line in sys.stdin:
        path = Path(line.strip())
        if engine is None:
            # The cluster's processors are for the engines of other drivers.
            engine = RayEngine(WORKERS, worker_options={"num_cpus": 0})
        engine.workers, engine.timeout, engine.retries = WORKERS, None, 3
        answer = "done"
        with open(path.with_suffix(".out"), "w") as out, contextlib.redirect_stdout(out):
            try:
                exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__", "ENGINE": engine})
            except BaseException:
                answer, engine = "failed", None
                traceback.print_exc(file=out)
        print(answer, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    serve()
