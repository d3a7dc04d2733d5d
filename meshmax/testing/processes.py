"""Real peers as child processes: `meshmax peer` with a home and a log of its own, for demos, measurements and tests.

Every peer runs in a session of its own, so that its engine's processes can be found and none outlives it. Times are real.
Not here: peers in simulated time (memory_swarm and open_node).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import httpx

from meshmax.base.errors import ConnectError

READY_TIMEOUT_S: Final = 60.0  # a cold start reads some hundred MB of libraries
END_TIMEOUT_S: Final = 5.0  # a peer promises 2 s
POLL_S: Final = 0.02
LOG_LINES: Final = 20  # shown when something failed

T = TypeVar("T")


class PeerProcess:
    """One `meshmax peer`. A context manager: leaving the block ends it, by force if it must."""

    def __init__(self, home: Path, name: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """``home`` is made by the peer; ``flags`` and ``env`` are added to what every such peer gets."""
        self.home = home
        self.name = name
        self.log = home.parent / f"{home.name}.log"
        self.url = ""
        self.peer_id = ""
        self.ready_after_s = 0.0
        self._flags = flags
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the running peer."""
        return self._running().pid

    def start(self) -> None:
        """Start the peer; returns at once."""
        self.home.parent.mkdir(parents=True, exist_ok=True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MESHMAX_")}
        command = [sys.executable, "-m", "meshmax.cli.main", "peer", "--home", str(self.home), "--name", self.name]
        self._started_s = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._flags],
                env={**clean, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> Self:
        """Wait until the API answers. Raises ConnectError, with the end of the log, if it does not."""
        self.wait_for("answers on its API", self._answers, timeout_s)
        self.ready_after_s = time.monotonic() - self._started_s
        return self

    def wait_for(self, what: str, check: Callable[[], T], timeout_s: float) -> T:
        """The first true value of ``check``, asked again and again. Raises ConnectError when the peer ended or time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := check():
                    return value
            except httpx.HTTPError:
                pass
            code = self._running().poll()
            if code is not None:
                raise ConnectError(f"{self.name}: the peer ended with exit code {code}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ConnectError(f"{self.name}: not seen within {timeout_s:.0f} s: {what}\n{self.log_tail()}")
            time.sleep(POLL_S)

    def get(self, path: str) -> Any:
        """The JSON at ``path`` of the peer's API."""
        return httpx.get(self.url + path, timeout=10.0, trust_env=False).raise_for_status().json()

    def neighbours(self) -> set[str]:
        """PeerIds that this peer sees online."""
        return {key for key, node in self.get("/api/v1/nodes")["nodes"].items() if node["status"] == "online"}

    def send(self, number: int) -> None:
        """Send a signal to the peer alone."""
        self._running().send_signal(number)

    def wait_end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        return self._running().wait(timeout_s)

    def end(self) -> int | None:
        """End the peer and whatever it left; its exit code, None if it was never started. Idempotent."""
        if self._process is None:
            return None
        try:
            if self._process.poll() is None:
                self._process.terminate()
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            for pid in session_pids(self._process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """The end of what the peer wrote."""
        try:
            text = self.log.read_text("utf-8", "replace").splitlines()[-lines:]
        except OSError:
            text = []
        return "\n".join((f"--- end of {self.log}", *text, "---"))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ConnectError(f"{self.name} was not started")
        return self._process

    def _answers(self) -> bool:
        try:
            run = json.loads((self.home / "run.json").read_text())
        except (OSError, ValueError):
            return False
        if run.get("pid") != self._running().pid:
            return False
        self.url, self.peer_id = run["api"].rstrip("/"), run["peer_id"]
        return httpx.get(self.url + "/api/version", timeout=2.0, trust_env=False).is_success


def session_pids(session: int) -> list[int]:
    """Processes that are alive in the session which ``session`` led (a peer and its engine's processes)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_all_see_each_other(peers: Sequence[PeerProcess], timeout_s: float) -> float:
    """Seconds until every peer sees every other one online. Raises ConnectError."""
    began_s = time.monotonic()
    for peer in peers:
        others = {other.peer_id for other in peers} - {peer.peer_id}
        left_s = timeout_s - (time.monotonic() - began_s)
        peer.wait_for(f"{len(others)} neighbours online", partial(_sees, peer, others), left_s)
    return time.monotonic() - began_s


def _sees(peer: PeerProcess, others: set[str]) -> bool:
    return others <= peer.neighbours()
