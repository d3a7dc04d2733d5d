"""Real processes that share no LAN: they meet at bootstrap nodes, and need those only to meet."""

from functools import partial
from pathlib import Path

import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, until
from tests.loopback.bootstrap_site import points

pytestmark = pytest.mark.loopback


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
