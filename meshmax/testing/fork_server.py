"""Peers that begin in a moment: forked from an interpreter that has imported everything, for tests of many starts.

What runs is the program itself (`meshmax.cli.main`, or another module with a `main`), in a process of its own with an
environment, log and signals of its own; only the seconds of importing are saved. One server serves one test session, one
start at a time. It has no threads when it forks. Linux only (pidfd).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

PROGRAM: Final = "meshmax.cli.main"
_PR_SET_PDEATHSIG: Final = 1
_EARLY: Final = (
    PROGRAM,
    "meshmax.cli.peer",
    "meshmax.node.opening",
    "meshmax.node.bootstrap",
    "meshmax.api.server",
    "libp2p.stream_muxer.yamux.yamux",
)


class Forked:
    """A forked process, as much of subprocess.Popen as tests use. Its exit code is not known to us: 0."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd: int | None = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """None while it runs."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """As Popen does: nothing if it has ended."""
        if self._fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> int | None:
        if self._fd is not None and select.select([self._fd], [], [], timeout)[0]:
            os.close(self._fd)
            self._fd, self.returncode = None, 0
        return self.returncode


class ForkServer:
    """Made by `open_fork_server`."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        self._lock = threading.Lock()

    def start(
        self, arguments: Sequence[str], env: Mapping[str, str], log: Path, program: str = PROGRAM, network: str = ""
    ) -> Forked:
        """Begin ``program`` with ``arguments`` and nothing but ``env``; its output is appended to ``log``.

        ``network``: a file that stands for the network namespace where it shall be; it then ends with the server.
        """
        word = {
            "program": program,
            "arguments": list(arguments),
            "env": dict(env),
            "log": str(log),
            "network": network,
        }
        with self._lock:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.write(json.dumps(word) + "\n")
            self._server.stdin.flush()
            return Forked(int(self._server.stdout.readline()))


@contextlib.contextmanager
def open_fork_server() -> Iterator[ForkServer]:
    """A server that ends with the block; what it forked does not."""
    command = [sys.executable, "-m", "meshmax.testing.fork_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        server.stdout.readline()  # it has imported everything
        try:
            yield ForkServer(server)
        finally:
            server.stdin.close()
            server.wait(10)


def serve() -> None:
    """Fork for each line of standard input until its end, and answer with the child's pid."""
    for module in _EARLY:
        importlib.import_module(module)
    gc.freeze()  # the garbage collector would copy every page that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    print("ready", flush=True)  # noqa: T201  the protocol of this pipe
    while line := sys.stdin.readline():
        if (pid := os.fork()) == 0:
            sys.exit(_become(json.loads(line)))
        print(pid, flush=True)  # noqa: T201


def _become(word: dict[str, object]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(str(word["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for fd, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, place)
    os.close(nothing)
    os.close(log)
    if word["network"]:
        _move(str(word["network"]))
    os.environ.clear()
    os.environ.update(dict(word["env"]))  # type: ignore[call-overload]
    return int(importlib.import_module(str(word["program"])).main(word["arguments"]))


def _move(network: str) -> None:
    """Into the network namespace, which must not outlive the tests that made it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    fd = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(fd, 0):  # Python has it from 3.12 on
        raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    os.close(fd)


if __name__ == "__main__":
    serve()
