"""The process of which ``forking`` makes copies: imports what tests need, and forks for every request on a socket."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import warnings
from typing import Any

import torch

# Beside what these import; the rest is imported by who needs it.
MODULES = ("torch.distributed.run", "engine_cases", "helpers")


def serve(address: str) -> dict[str, Any]:
    """Fork for every request, and return it in the process that is to do what it says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, selectors.DefaultSelector() as selector:
        listening.bind(address)
        listening.listen()
        print("!", end="", flush=True)
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listening, selectors.EVENT_READ)
        while True:
            if any(key.fileobj is sys.stdin for key, _ in selector.select()):
                os._exit(0)
            channel, _ = listening.accept()
            message, streams, _, _ = socket.recv_fds(channel, 1 << 20, 3)
            request: dict[str, Any] = json.loads(message)
            for name in request["modules"]:
                importlib.import_module(name)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                watch(channel, streams)
                break
            channel.close()
            for stream in streams:
                os.close(stream)
    return request


def watch(channel: socket.socket, streams: list[int]) -> None:
    """Fork again, and return in the child alone; its parent stays to say what becomes of it, as nobody else can."""
    child = os.fork()
    if child == 0:
        channel.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    channel.send(str(child).encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def begin(request: dict[str, Any]) -> None:
    """Do what Python does with its arguments."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    what, *rest = request["arguments"]
    if what == "-W":
        action, what, *rest = rest
        sys.warnoptions.append(action)
        warnings.simplefilter(action)
    if what == "-u":
        what, *rest = rest
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    # Nobody waits for the parents of the copies.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for module in MODULES:
        importlib.import_module(module)
    # The first optimizer imports what takes as long as torch.
    torch.optim.SGD([torch.zeros(1)])
    # What is there need not be looked through again, least of all at the end of each process.
    gc.collect()
    gc.freeze()
    begin(serve(sys.argv[1]))
