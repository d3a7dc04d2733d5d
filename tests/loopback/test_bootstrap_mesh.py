"""Real processes that share no LAN: they meet at bootstrap nodes, and need those only to meet."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, spawn, until

pytestmark = pytest.mark.loopback


class Point:
    """`meshmax bootstrap` as a process."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        self.home = home
        self.log = home / "bootstrap.log"
        listen = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
        self.process = spawn(["bootstrap", "--home", str(home), *listen], _environment(), self.log)

    @property
    def address(self) -> str:
        """Where peers meet, once it is up."""
        return str(until("the bootstrap node is up", self._facts)["addresses"][0])

    def _facts(self) -> dict[str, Any]:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        if not (self.home / "run.json").exists():
            return {}
        api = json.loads((self.home / "run.json").read_text())["api"]
        return dict(httpx.get(api.rstrip("/") + "/health", timeout=5, trust_env=False).json())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHMAX_")}
    return kept | {"MESHMAX_DHT_PORT": "0", "MESHMAX_OBSERVER_PORT": "0"}


@contextmanager
def points(folder: Path, *names: str) -> Iterator[list[Point]]:
    started: list[Point] = []
    try:
        started.extend(Point(folder / name) for name in names)
        yield started
    finally:
        for point in started:
            point.kill()


def lists(peer: PeerProcess, name: str) -> bool:
    return any(model["name"] == f"{name}:latest" for model in peer.get("/api/tags")["models"])


def has_locally(peer: PeerProcess, name: str) -> bool:
    return bool(peer.get("/api/v1/models")["models"].get(f"{name}:latest", {}).get("local"))


def test_peers_that_share_no_lan_meet_at_a_bootstrap_node_and_outlive_it(tmp_path: Path) -> None:
    with points(tmp_path, "north", "south") as (north, south):
        settings = {"lan": "false", "bootstrap": f"{north.address},{south.address}"}
        with peers(tmp_path, "a", "b", **settings) as (a, b):
            meet(a, b)
            model = tmp_path / "tiny.gguf"
            model.write_bytes(build_gguf(tensor_bytes=1 << 20))
            a.run("add", "tiny", str(model))
            until("the model is listed", partial(lists, b, "tiny"))
            b.run("pull", "tiny")
            assert has_locally(b, "tiny")
            north.kill()
            with peers(tmp_path, "c", **settings) as (c,):
                meet(a, b, c)
                assert {a.peer_id, b.peer_id} == set(c.neighbours())  # bootstrap nodes are no members
            south.kill()
            # The third has left, and of all whom they ever met there only each other stays.
            until("the third is seen to leave", lambda: a.neighbours() == [b.peer_id])
