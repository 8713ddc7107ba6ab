"""A pool of greenlets that run fitness functions. Making a greenlet takes as long as two calls of a model."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import greenlet

# Largest size of the pool: the members of a chunk. A greenlet takes about 20 kB.
_MOST = 1024


class _Idle(threading.local):
    """The idle greenlets of a thread."""

    def __init__(self) -> None:
        self.greenlets: list[greenlet.greenlet] = []


_idle = _Idle()


def start(job: Callable[[], None], hub: greenlet.greenlet) -> greenlet.greenlet:
    """Run ``job`` in a greenlet, with a copy of the caller's context variables, until it switches to ``hub`` or ends.

    Args:
        job: The function to run. It must not raise.
        hub: The calling greenlet, which continues when the job has ended.

    Returns:
        The greenlet. It may run other jobs after this one has ended.
    """
    worker = _idle.greenlets.pop() if _idle.greenlets else greenlet.greenlet(_work)
    worker.parent, worker.gr_context = hub, contextvars.copy_context()
    worker.switch(job, hub)
    return worker


def _work(job: Callable[[], None], hub: greenlet.greenlet) -> None:
    while True:
        job()
        del job
        idle = _idle.greenlets
        if len(idle) >= _MOST:
            return
        idle.append(greenlet.getcurrent())
        job, hub = hub.switch()
