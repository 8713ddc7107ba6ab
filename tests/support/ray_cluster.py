"""A cluster of Ray's on this machine, which stays while tests come and go: prints its address, ends with its input."""

from __future__ import annotations

import sys


def serve() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    serve()
