"""Real processes that have nothing but a node of the DHT in common."""

import socket
from functools import partial
from pathlib import Path

import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, until
from tests.loopback.bootstrap_site import Point
from tests.loopback.test_bootstrap_mesh import has_locally, lists

pytestmark = pytest.mark.loopback


def free_port() -> int:
    """One that is free for TCP and UDP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return int(tcp.getsockname()[1])


def found(peer: PeerProcess, rung: str) -> int:
    """How many peers that rung of ``peer`` found."""
    return int(next(each for each in peer.get("/api/v1/status")["discovery"] if each["name"] == rung)["found"])


def test_peers_meet_by_the_dht_alone_and_pull(tmp_path: Path) -> None:
    port = free_port()
    point = Point(tmp_path / "point", listen=f"127.0.0.1:{port}", dht_port=str(port), serve_rendezvous="false")
    try:
        settings = {"lan": "false", "bootstrap": point.address, "dht_port": "0"}
        with peers(tmp_path, "a", "b", **settings) as (a, b):
            meet(a, b)
            # Who looked first has dialled; the other one is met by being dialled, and its own rung may find nobody yet.
            assert found(a, "dht") + found(b, "dht") >= 1
            assert found(a, "rendezvous") + found(b, "rendezvous") == 0
            model = tmp_path / "tiny.gguf"
            model.write_bytes(build_gguf(tensor_bytes=1 << 20))
            a.run("add", "tiny", str(model))
            until("the model is listed", partial(lists, b, "tiny"))
            b.run("pull", "tiny")
            assert has_locally(b, "tiny")
    finally:
        point.kill()
