"""Greenlets that run fitness functions, used again and again: to make one takes as long as two calls of a model."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import greenlet

# As many as a chunk has members; each holds some 20 kB.
_MOST = 1024


class _Idle(threading.local):
    """The greenlets of a thread that have nothing to do."""

    def __init__(self) -> None:
        self.greenlets: list[greenlet.greenlet] = []


_idle = _Idle()


def start(job: Callable[[], None], hub: greenlet.greenlet) -> greenlet.greenlet:
    """Run ``job`` in a greenlet, with a copy of the caller's context variables, until it switches to ``hub`` or ends.

    Args:
        job: Must not raise.
        hub: The calling greenlet, which goes on when the job has ended.

    Returns:
        The greenlet; it may have other jobs once this one has ended.
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
