"""Real peers on the hosts of a laboratory, asked over their HTTP interface."""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from meshmax.base.ids import PeerId
from meshmax.store.identity import load_identity
from meshmax.testing.fork_server import PROGRAM, ForkServer
from meshmax.testing.process import PeerProcess, Process, start_peer, until, wait_for_api
from tests.natlab.lab import Host

CONTROL_PORT: Final = 11435  # where peers listen that are told nothing else
LOOK_EVERY_S: Final = 0.02
_PR_SET_PDEATHSIG: Final = 1


class Site:
    """Peers by the name of their host, one each, with homes below ``folder``. Made by `open_site`.

    Without ``forks`` they start as anybody's do, and import everything first.
    """

    def __init__(self, folder: Path, forks: ForkServer | None, **settings: str) -> None:
        self.folder, self.forks, self.settings = folder, forks, settings
        self.hosts: dict[str, Host] = {}
        self.peers: dict[str, PeerProcess] = {}
        self.points: dict[str, PeerProcess] = {}  # bootstrap nodes
        self.ids: dict[str, PeerId] = {}
        self._clients: dict[str, httpx.Client] = {}

    def start(self, *hosts: Host, **settings: str) -> None:
        """A peer on each host, started at once; all answer when this returns."""
        for host in hosts:
            home = self.folder / host.name
            home.mkdir(exist_ok=True)
            (home / "run.json").unlink(missing_ok=True)  # of one that was killed
            self.hosts[host.name] = host
            self.ids[host.name] = load_identity(home).peer_id
            usual = {
                "listen": f"0.0.0.0:{CONTROL_PORT},[::]:{CONTROL_PORT}",
                "lan_interfaces": "",
                "engine_kind": "none",
                "name": host.name,
            }
            self.peers[host.name] = start_peer(
                home, wait=False, spawned_by=partial(self._spawn, host), **{**usual, **self.settings, **settings}
            )
            if old := self._clients.pop(host.name, None):
                old.close()
        for host in hosts:
            with host.inside():
                wait_for_api(self.peers[host.name])

    def _spawn(self, host: Host, arguments: Sequence[str], env: dict[str, str], log: Path) -> Process:
        if self.forks is not None:
            return self.forks.start(arguments, env, log, PROGRAM, host.path)
        with host.inside(), log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *arguments],
                env=env,
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_us,  # noqa: PLW1509  no thread runs where peers start like this
            )

    def start_bootstrap(self, host: Host, ip: str, *ports: int) -> str:
        """A bootstrap node at these ports, CONTROL_PORT if none is said, and its address (at the first) once it answers."""
        home = self.folder / host.name
        home.mkdir(exist_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("MESHMAX_")}
        listen = [word for port in ports or (CONTROL_PORT,) for word in ("--listen", f"0.0.0.0:{port}")]
        flags = ["--home", str(home), *listen, "--api", "127.0.0.1:0"]
        self.ids[host.name] = load_identity(home).peer_id
        log = home / "peer.log"
        process = self._spawn(host, ["bootstrap", *flags], {**env, "MESHMAX_LOG_LEVEL": "debug"}, log)
        self.points[host.name] = PeerProcess(process, home, log)
        until("the bootstrap node is up", (home / "run.json").exists, 90.0)
        return self.address(host.name, ip, *ports[:1])

    def stop_bootstrap(self, host: Host) -> None:
        """Kill it."""
        self.points.pop(host.name).kill()

    # --- asking ------------------------------------------------------------------------------------------------------

    def call(self, name: str, method: str, path: str, body: Any = None, timeout_s: float = 30.0) -> httpx.Response:
        """What its API answers. Raises httpx.HTTPStatusError unless 2xx."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = httpx.Client(base_url=self.peers[name].api, trust_env=False)
        with self.hosts[name].inside():
            reply = client.request(method, path, json=body, timeout=timeout_s)
        reply.raise_for_status()
        return reply

    def get(self, name: str, path: str) -> Any:
        """The JSON at ``path``."""
        return self.call(name, "GET", path).json()

    def online(self, name: str) -> set[PeerId]:
        """The peers that it sees online; not itself."""
        nodes = self.get(name, "/api/v1/nodes")["nodes"]
        return {peer for peer, node in nodes.items() if node["status"] == "online"}

    def sees(self, name: str, *others: str) -> bool:
        """Whether it sees all of them."""
        return {self.ids[other] for other in others} <= self.online(name)

    def names(self, name: str) -> set[str]:
        """The hosts of the peers that it sees online."""
        of = {peer_id: host for host, peer_id in self.ids.items()}
        return {of[peer_id] for peer_id in self.online(name)}

    def make_private(self, first: str, *others: str) -> None:
        """Put them into a private mesh of the first one."""
        self.call(first, "POST", "/api/v1/mesh", {"name": f"of-{first}"})
        for other in others:
            made = self.call(first, "POST", "/api/v1/mesh/tickets", {"scopes": ["infer", "pull"], "uses": 1}).json()
            self.call(other, "POST", "/api/v1/mesh/join", {"ticket": made["ticket"]}, timeout_s=60.0)

    def where(self, name: str, other: str) -> str:
        """The address at which it is connected to the other one; '' where it is not."""
        node = self.get(name, "/api/v1/nodes")["nodes"].get(self.ids[other], {})
        return str(node.get("address", "")) if node.get("status") == "online" else ""

    def until_met(self, *names: str, within_s: float = 60.0) -> float:
        """Until all see all others; how many seconds the last pair took."""
        return max(self.until_pairs(*names, within_s=within_s).values())

    def until_pairs(self, *names: str, within_s: float = 60.0) -> dict[tuple[str, str], float]:
        """Until all see all others; after how many seconds each of them saw each other one."""
        names = names or tuple(self.peers)
        began_s, seen = time.monotonic(), dict[tuple[str, str], float]()
        wanted = {(a, b) for a in names for b in names if a != b}
        until(
            "all see all others",
            lambda: self._note(wanted, began_s, seen),
            within_s,
            LOOK_EVERY_S,
        )
        return seen

    def _note(self, wanted: set[tuple[str, str]], began_s: float, seen: dict[tuple[str, str], float]) -> bool:
        for name in {a for a, b in wanted - seen.keys()}:
            online = self.online(name)
            for pair in [(a, b) for a, b in wanted - seen.keys() if a == name and self.ids[b] in online]:
                seen[pair] = time.monotonic() - began_s
        return wanted == seen.keys()

    def until_parted(self, *names: str, within_s: float = 60.0) -> None:
        """Until none of them sees another one."""
        for name in names:
            others = {self.ids[other] for other in names if other != name}
            until(f"{name} is alone", partial(self._sees_none, name, others), within_s)

    def _sees_none(self, name: str, others: set[PeerId]) -> bool:
        return not others & self.online(name)

    def log(self, name: str) -> str:
        """What it has logged."""
        return self.peers[name].log.read_text(errors="replace")

    def until_log(self, name: str, text: str, within_s: float = 60.0, after: int = 0) -> int:
        """Until its log says ``text`` beyond the first ``after`` characters; where."""
        return until(f"{name} logs '{text}'", partial(self._found, name, text, after), within_s)

    def _found(self, name: str, text: str, after: int) -> int:
        return self.log(name).find(text, after) + 1

    def tails(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"--- {name}\n{peer.tail(60)}" for name, peer in {**self.peers, **self.points}.items())

    def address(self, name: str, ip: str, port: int = CONTROL_PORT) -> str:
        """The multiaddr of the peer on that host."""
        kind = "ip6" if ":" in ip else "ip4"
        return f"/{kind}/{ip}/tcp/{port}/p2p/{self.ids[name]}"

    # --- ends --------------------------------------------------------------------------------------------------------

    def stop(self, *names: str) -> None:
        """SIGTERM for all of them, and wait."""
        for name in names:
            self.peers[name].end()
        for name in names:
            self.peers.pop(name).stop()

    def close(self) -> None:
        """End all of them at once."""
        for peer in (*self.peers.values(), *self.points.values()):
            peer.thaw()
            peer.kill()
        for client in self._clients.values():
            client.close()


@contextmanager
def open_site(folder: Path, forks: ForkServer | None, **settings: str) -> Iterator[Site]:
    """Peers that are all ended with the block."""
    site = Site(folder, forks, **settings)
    try:
        yield site
    finally:
        site.close()


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def median(pairs: dict[tuple[str, str], float]) -> float:
    """Of the seconds that the pairs took."""
    return statistics.median(pairs.values())
