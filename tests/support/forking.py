"""Python processes that start in no time: copies of one that has imported torch and the library already.

    with Forked("script.py", "argument", environment=os.environ) as process:
        out, errors = process.communicate(timeout=60)

is ``subprocess.Popen([sys.executable, "script.py", "argument"], …)`` without two or three seconds of imports. The
process is a real one, whose interpreter begins and ends as usual; only modules are there already. ``COMMAND`` is the
same for whoever starts processes by a command, such as torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

COMMAND = (sys.executable, "-S", "-E", __file__)
SERVER = Path(__file__).with_name("fork_server.py")
ADDRESS = "EGGROLL_TEST_FORK_SERVER"


class Forked:
    """A running process, to be used as one of ``subprocess.Popen`` with pipes for text.

    Args:
        arguments: Those of Python: ``-m``, ``-c`` or a script, after ``-W`` with an action if any.
        environment: All of it.
        modules: To be imported before the process is forked, and all that follow.
        errors: A file that gets stderr instead of a pipe.
    """

    def __init__(
        self, *arguments: Any, environment: Mapping[str, str], modules: Sequence[str] = (), errors: int | None = None
    ) -> None:
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        self.stdin: IO[str] = open(stdin[1], "w")  # noqa: SIM115  closed with the process
        self.stdout: IO[str] = open(stdout[0])  # noqa: SIM115
        self.stderr: IO[str] = open(stderr[0])  # noqa: SIM115
        theirs = stdin[0], stdout[1], stderr[1]
        self._copy = _Copy(arguments, environment, modules, (*theirs[:2], theirs[2] if errors is None else errors))
        self.pid = self._copy.pid
        for end in theirs:
            os.close(end)

    @property
    def returncode(self) -> int | None:
        return self._copy.status

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return self._copy.wait(timeout)

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
        self._copy.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr, self._copy):
            pipe.close()


class _Copy:
    """A process that the server has forked, with the standard streams that it was given."""

    def __init__(
        self, arguments: Sequence[Any], environment: Mapping[str, str], modules: Sequence[str], streams: Sequence[int]
    ) -> None:
        address = os.environ.get(ADDRESS) or _start_server()
        request = {
            "arguments": [*map(str, arguments)],
            "environment": {**environment, ADDRESS: address},
            "folder": os.getcwd(),
            "modules": [*modules],
        }
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.connect(address)
        socket.send_fds(self._channel, [json.dumps(request).encode()], streams)
        self.pid = int(self._channel.recv(64))
        self.status: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self.status = int(self._channel.recv(64))
        self._ended.set()

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.status is not None
        return self.status

    def send_signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        self._channel.close()


@functools.cache
def _start_server() -> str:
    folder = tempfile.mkdtemp()
    address = f"{folder}/socket"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, str(SERVER), address],
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    # It says a word when it listens.
    assert server.stdout.read(1), "the server did not start"
    server.stdout.close()

    def end() -> None:
        # With its input.
        server.communicate()
        shutil.rmtree(folder)

    atexit.register(end)
    return address


def main() -> None:
    """Stand for a process that does what Python would do with the arguments."""
    copy = _Copy(sys.argv[1:], os.environ, (), (0, 1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: copy.send_signal(number))
    status = copy.wait()
    if status < 0:
        # Ended by a signal, as that process was. The handler of SIGKILL cannot be set.
        if -status in (signal.SIGINT, signal.SIGTERM):
            signal.signal(-status, signal.SIG_DFL)
        signal.raise_signal(-status)
    sys.exit(status)


if __name__ == "__main__":
    main()
