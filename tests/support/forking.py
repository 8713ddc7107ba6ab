"""Python processes that start in no time: copies of one that has imported torch and the library already.

    with Forked("script.py", "argument") as process:
        out, errors = process.communicate(timeout=60)

is ``subprocess.Popen([sys.executable, "script.py", "argument"], …)`` without the two or three seconds of imports. The
process is a real one, with an interpreter of its own that begins and ends as usual; only modules are there already.

Run as a script, this is the process that is copied: it forks for every request that arrives on a socket.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

# Beside what these import; a process imports the rest itself.
PRELOADED = ("torch.distributed.run", "engine_cases", "helpers")


class Request(NamedTuple):
    """What ``python ARGUMENTS…`` needs: ``-m``, ``-c`` or a script, after ``-W`` with an action if any."""

    arguments: list[str]
    environment: Mapping[str, str]
    folder: str
    modules: Sequence[str]


class Forked:
    """A running process, to be used as one of ``subprocess.Popen`` with pipes for text.

    Args:
        arguments: Those of Python.
        environment: All of it.
        modules: To be imported before the process is forked, for all that follow.
        errors: A file that gets stderr instead of a pipe.
    """

    def __init__(
        self, *arguments: Any, environment: Mapping[str, str], modules: Sequence[str] = (), errors: int | None = None
    ) -> None:
        request = Request([str(a) for a in arguments], environment, os.getcwd(), modules)
        self._channel, theirs = socket.socketpair()
        in_end, into = os.pipe()
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        self.stdin: IO[str] = open(into, "w")
        self.stdout: IO[str] = open(out)
        self.stderr: IO[str] = open(err)
        ends = [theirs.fileno(), in_end, out_end, err_end if errors is None else errors]
        socket.send_fds(_server(), [pickle.dumps(request)], ends)
        theirs.close()
        for end in (in_end, out_end, err_end):
            os.close(end)
        self._lines = self._channel.makefile()
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self.returncode = int(self._lines.readline())
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.stdin.close()
        texts: dict[IO[str], str] = {}
        readers = [
            threading.Thread(target=lambda pipe=pipe: texts.update({pipe: pipe.read()}), daemon=True)
            for pipe in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[self.stdout], texts[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr, self._lines, self._channel):
            pipe.close()


@functools.cache
def _server() -> socket.socket:
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join(sys.path)
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def end() -> None:
        own.close()
        server.wait()

    atexit.register(end)
    return own


def serve(control: socket.socket) -> Request:
    """Fork for every request, and return it in the process that is to do what it says."""
    import importlib

    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    # The first optimizer imports what takes as long as torch.
    torch.optim.SGD([torch.zeros(1)])
    # What is there need not be looked through again, least of all at the end of each process.
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not message:
            os._exit(0)
        request: Request = pickle.loads(message)
        for name in request.modules:
            importlib.import_module(name)
        if os.fork() == 0:
            control.close()
            # What ended a process only its parent can tell: this one, as the server goes on.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(socket.socket(fileno=descriptors[0]), descriptors[1:])
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(channel: socket.socket, pipes: list[int]) -> None:
    """Fork, and return in the child alone; the parent says on the channel what becomes of it."""
    child = os.fork()
    if child == 0:
        channel.close()
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
            os.close(pipe)
        return
    for pipe in (0, 1, 2, *pipes):
        os.close(pipe)
    channel.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        channel.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def begin(request: Request) -> None:
    """Do what ``python ARGUMENTS…`` does once it has started."""
    import runpy
    import warnings

    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    what, *rest = request.arguments
    if what == "-W":
        sys.warnoptions.append(rest[0])
        warnings.simplefilter(rest[0])  # type: ignore[arg-type]
        what, *rest = rest[1:]
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    begin(serve(socket.socket(fileno=int(sys.argv[1]))))
