"""Two sites of real processes, a bootstrap node known to one of them alone: the other learns it of a ticket, for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshmax.store import dht_file, peers_file
from meshmax.testing.process import PeerProcess, meet, spawn, start_peer, until
from tests.loopback.bootstrap_site import Point
from tests.loopback.test_dht_mesh import free_port

pytestmark = pytest.mark.loopback

Settings = dict[str, str]
# What a bootstrap node does, and what peers climb: each of the two ways alone has to be enough.
WAYS: list[tuple[str, Settings, Settings]] = [
    ("rendezvous", {}, {"dht": "false"}),
    ("dht", {"serve_rendezvous": "false"}, {"dht_port": "0"}),
]


@contextmanager
def running(folder: Path, given: dict[str, Settings]) -> Iterator[list[PeerProcess]]:
    """Peers by name, off the LAN; each start is at ports of its own."""
    started: list[PeerProcess] = []
    try:
        for name, settings in given.items():
            started.append(
                start_peer(folder / name, "--no-lan", "--name", name, wait=True, spawned_by=spawn, **settings)
            )
        yield started
    finally:
        for peer in started:
            peer.stop()


def forget_peers(home: Path) -> None:
    """What it knows of where others are; its membership stays."""
    (home / peers_file.FILE_NAME).unlink(missing_ok=True)  # who left within a moment was not written down
    (home / dht_file.FILE_NAME).unlink(missing_ok=True)


@pytest.mark.parametrize(("way", "serves", "settings"), WAYS, ids=[way for way, _, _ in WAYS])
def test_a_bootstrap_node_that_a_ticket_named_is_used_after_a_restart(
    way: str, serves: Settings, settings: Settings, tmp_path: Path
) -> None:
    port = free_port()
    point = Point(tmp_path / "point", listen=f"127.0.0.1:{port}", dht_port=str(port), **serves)
    try:
        given = {"a": {**settings, "bootstrap": point.address}, "b": settings}
        with running(tmp_path, given) as (a, b):
            a.run("mesh", "new", "two-sites")
            b.run("join", a.run("ticket").stdout.strip())
            meet(a, b)
            before = b.get("/api/v1/status")["addresses"]
            named = [{"address": point.address, "source": "ticket"}]
            assert b.get("/api/v1/mesh")["bootstrap"] == named
            assert a.get("/api/v1/mesh")["bootstrap"] == [{**named[0], "source": "config"}]
            assert point.address in b.run("mesh").stdout
        for name in given:
            forget_peers(tmp_path / name)
        with running(tmp_path, given) as (a, b):
            meet(a, b)
            rungs = {rung["name"]: rung for rung in b.get("/api/v1/status")["discovery"]}
            assert (rungs[way]["state"], rungs["cached"]["found"]) == ("working", 0)
            assert b.get("/api/v1/status")["addresses"] != before
            b.run("mesh", "leave")
            assert b.get("/api/v1/mesh")["bootstrap"] == []
            until("the rung is off", lambda: _state(b, "rendezvous") == "off")
            assert _state(b, "dht") == "off"
    finally:
        point.kill()


def _state(peer: PeerProcess, rung: str) -> str:
    return str({each["name"]: each for each in peer.get("/api/v1/status")["discovery"]}[rung]["state"])
