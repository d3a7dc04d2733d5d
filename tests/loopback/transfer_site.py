"""Peers among themselves, for the tests of faults: they join each other by address, are started in a moment, and counted.

No other peer of this machine can meet them. What is counted: bytes of blobs (`/metrics`), what a dead peer has on its disk.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.services.pull_job import LOOK_INTERVAL_S
from meshmax.store.disk import Disk
from meshmax.store.identity import load_identity
from meshmax.store.layout import Layout
from meshmax.store.maps import MapFiles
from meshmax.store.partials import load_bits, load_marked
from meshmax.testing.faulty_peer import FAULT
from meshmax.testing.fork_server import PROGRAM, ForkServer
from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, Process, start_peer, until, wait_for_api

NAME: Final = "big"


class Mesh:
    """Peers below ``folder`` that know each other's addresses, and are started, killed and started again by name."""

    def __init__(self, folder: Path, forks: ForkServer | None, names: Sequence[str], **settings: str) -> None:
        self.folder, self.forks, self.settings = folder, forks, settings
        self.peers: dict[str, PeerProcess] = {}
        self.ids: dict[str, PeerId] = {}
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._http = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            self.ids[name] = load_identity(folder / name).peer_id

    def start(self, *names: str, fault: str = "", **settings: str) -> None:
        """Start (again) those that are named."""
        for name in names:
            ip, others = self.ip(name), (other for other in self._ports if other != name)
            known = {
                "lan": "false",
                "engine_kind": "none",
                "listen": f"{ip}:{self._ports[name]}",
                "lane_port": "0",
                "name": name,
                "join": ",".join(f"/ip4/{self.ip(o)}/tcp/{self._ports[o]}/p2p/{self.ids[o]}" for o in others),
                **({"fault": fault} if fault else {}),
                **self.settings,
                **settings,
            }
            run_file = self.folder / name / "run.json"
            run_file.unlink(missing_ok=True)  # of the one that was killed
            with self.inside(name):
                self.peers[name] = start_peer(self.folder / name, wait=False, spawned_by=self.spawn, **known)
        for name in names:
            with self.inside(name):
                wait_for_api(self.peers[name])

    # --- where they are ------------------------------------------------------------------------------------------------

    def ip(self, name: str) -> str:
        """Where it listens."""
        return "127.0.0.1"

    def inside(self, name: str) -> AbstractContextManager[None]:
        """While inside, this thread is where that peer is."""
        return nullcontext()

    def spawn(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> Process:
        """Start one of them."""
        assert self.forks is not None
        return self.forks.start(arguments, env, log, "meshmax.testing.faulty_peer" if FAULT in env else PROGRAM)

    def close(self) -> None:
        """End all of them."""
        for peer in self.peers.values():
            peer.thaw()
            peer.kill()
        self._http.close()

    # --- asking ------------------------------------------------------------------------------------------------------

    def call(self, name: str, method: str, path: str, body: Any = None) -> httpx.Response:
        """What its API answers. Raises httpx.HTTPStatusError unless 2xx."""
        with self.inside(name):
            reply = self._http.request(method, self.peers[name].api + path, json=body)
        reply.raise_for_status()
        return reply

    def get(self, name: str, path: str) -> Any:
        return self.call(name, "GET", path).json()

    def add(self, *names: str, path: Path, link: bool = False) -> None:
        """Let them have the file as NAME."""
        for name in names:
            reply = self.call(name, "POST", "/api/v1/models/add", {"name": NAME, "path": str(path), "link": link})
            assert "success" in reply.text, reply.text

    def delete(self, name: str) -> None:
        """Drop its copy."""
        self.call(name, "DELETE", f"/api/v1/models/{NAME}")

    def meet(self, *names: str) -> None:
        """Until each is connected to all the others."""
        for name in names:
            until(f"{name} is connected", partial(self._is_met, name, {self.ids[o] for o in names} - {self.ids[name]}))

    def _is_met(self, name: str, others: set[PeerId]) -> bool:
        nodes = self.get(name, "/api/v1/nodes")["nodes"]
        return others <= {peer for peer, node in nodes.items() if node["status"] == "online"}

    def lists(self, name: str) -> bool:
        """Whether it knows that somebody has the model."""
        return any(model["name"] == f"{NAME}:latest" for model in self.get(name, "/api/tags")["models"])

    def holders(self, name: str) -> int:
        model = self.get(name, "/api/v1/models")["models"].get(f"{NAME}:latest")
        return len(model["holders"]) if model else 0

    def pull(self, name: str, holders: int = 1) -> None:
        """Begin a pull that needs no watcher, once so many are known to have the model."""
        until("the holders are known", lambda: self.holders(name) >= holders)
        self.call(name, "POST", f"/api/v1/models/{NAME}/download", {})

    def transfer(self, name: str) -> dict[str, Any]:
        """The newest incoming one, {} if there is none."""
        shown = [one for one in self.get(name, "/api/v1/transfers")["transfers"] if one["direction"] == "in"]
        return dict(shown[0]) if shown else {}

    def state(self, name: str) -> str:
        return str(self.transfer(name).get("state", ""))

    def until_done(self, name: str, deadline_s: float = 60.0) -> dict[str, Any]:
        """The transfer when it is done."""

        def ended() -> bool:
            return self.state(name) in ("done", "failed", "cancelled")

        until(f"the pull of {name} ends", ended, deadline_s)
        last = self.transfer(name)
        assert last["state"] == "done", last
        return last

    def until_share(self, name: str, share: float, deadline_s: float = 60.0) -> dict[str, Any]:
        """The transfer when at least this share of it is there."""

        def there() -> dict[str, Any]:
            now = self.transfer(name)
            return now if now and 0 < now["bytes_total"] * share <= now["bytes_done"] else {}

        return until(f"{name} has {share:.0%} of it", there, deadline_s)

    def moved(self, name: str, direction: str) -> int:
        """Bytes of blobs that it counted since it was started."""
        text = self.call(name, "GET", "/metrics").text
        line = next((one for one in text.splitlines() if f'blob_bytes_total{{direction="{direction}"}}' in one), "x 0")
        return int(float(line.split()[-1]))

    def limit(self, name: str, rate: str) -> None:
        """Let it give no faster."""
        self.call(name, "PUT", "/api/v1/limits", {"up": rate})

    def steer(self, name: str, action: str) -> None:
        """Cancel, pause or resume its transfer."""
        self.call(name, "POST", f"/api/v1/transfers/{self.transfer(name)['id']}/{action}", {})

    def log(self, name: str) -> str:
        return (self.folder / name / "peer.log").read_text(errors="replace")

    # --- looking at the disk -------------------------------------------------------------------------------------------

    def kept(self, name: str, digest: Sha256) -> int:
        """Bytes of the blob that a peer which does not run has: in whole or by its bitmap and its marks."""
        home = self.folder / name
        layout = Layout(home / "models", home / "state")
        if layout.blob(digest).exists():
            return layout.blob(digest).stat().st_size
        chunk_map = MapFiles(layout, Disk()).load(digest)
        if chunk_map is None or not layout.partial(digest).exists():
            return 0
        haves = load_marked(layout, digest, chunk_map, load_bits(layout, digest, chunk_map))
        return sum(chunk_map.span(index)[1] for index in range(chunk_map.count) if index in haves)

    def holds(self, name: str, digest: Sha256, models: Path | None = None) -> bool:
        """Whether its blob is what its name says, byte for byte."""
        blob = (models or self.folder / name / "models") / "blobs" / f"sha256-{digest}"
        with blob.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest


@contextmanager
def mesh(folder: Path, forks: ForkServer, *names: str, start: bool = True, **settings: str) -> Iterator[Mesh]:
    """Peers of these names, all ended afterwards. ``start``: and connected."""
    with ending(Mesh(folder, forks, names, **settings)) as made:
        if start:
            made.start(*names)
            made.meet(*names)
        yield made


@contextmanager
def ending(made: Mesh) -> Iterator[Mesh]:
    """All its peers are ended afterwards; the ends of their logs are printed if something went wrong."""
    try:
        yield made
    except BaseException:
        for name, peer in made.peers.items():
            print(f"--- {name}\n{peer.tail(60)}")
        raise
    finally:
        made.close()


def random_model(folder: Path, chunks: int) -> tuple[Path, Sha256]:
    """A GGUF file of ``chunks`` chunks of bytes that cannot be guessed, and its digest."""
    size = chunks * CHUNK_BYTES - 4096
    whole = build_gguf(tensor_bytes=size)
    path = folder / "model.gguf"
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for part in (whole[:-size], *(os.urandom(min(CHUNK_BYTES, size - at)) for at in range(0, size, CHUNK_BYTES))):
            hasher.update(part)
            file.write(part)
    return path, Sha256(hasher.hexdigest())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def calm(read: Any, still_s: float = LOOK_INTERVAL_S + 0.3, deadline_s: float = 60.0) -> Any:
    """What ``read()`` gives once it has not changed for ``still_s``; transfers are told anew each LOOK_INTERVAL_S."""
    give_up, value, since_s = time.monotonic() + deadline_s, read(), time.monotonic()
    while time.monotonic() - since_s < still_s:
        assert time.monotonic() < give_up, "it does not come to rest"
        time.sleep(0.05)
        if (now := read()) != value:
            value, since_s = now, time.monotonic()
    return value
