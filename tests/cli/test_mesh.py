from __future__ import annotations

import json
from typing import Any

import pytest

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE
from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

A, B, C, D, E = (f"12D3KooW{letter * 44}" for letter in "ABCDE")


def node(peer_id: str, name: str, status: str, **more: Any) -> dict[str, Any]:
    return {
        "id": peer_id, "name": name, "status": status, "path": "direct", "rtt_ms": None, "models": [], "gpus": [],
        "addresses": [f"/ip4/10.0.0.1/tcp/11435/p2p/{peer_id}"], "load": {"running": 0, "queued": 0},
        "usage": {"cpu": 0, "memory": 0}, "version": "0.1.0", "last_seen": "2026-01-01T00:00:00Z", **more,
    }  # fmt: skip


def model(name: str, state: str = "disk") -> dict[str, str]:
    return {"name": name, "digest": "0" * 64, "state": state}


NODES = {
    B: node(B, "box", "online", rtt_ms=12.345, gpus=[{"name": "RTX 4090"}], load={"running": 2, "queued": 1},
            models=[model("smollm2:latest", "loaded"), model("llama3:8b"), model("c"), model("d"), model("e")]),
    C: node(C, "gone", "offline", addresses=[]),
    A: node(A, "here", "self", path="self", models=[model("registry.ollama.ai/library/x:latest", "partial")]),
}  # fmt: skip


def test_peers_shows_ourselves_first_then_by_round_trip(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    assert main(["peers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "PEER", "ID", "ADDRESS", "PATH", "RTT", "MODELS", "GPU", "LOAD"]
    cells = [[cell for cell in line.split("    ") if cell] for line in lines[1:]]
    assert [[cell.strip() for cell in row] for row in cells[:2]] == [
        ["here", A, "/ip4/10.0.0.1/tcp/11435", "-", "self", "x (partial)", "-", "idle"],
        [
            "box",
            B,
            "/ip4/10.0.0.1/tcp/11435",
            "direct",
            "12.3 ms",
            "smollm2 (loaded), llama3:8b, c, +2",
            "RTX 4090",
            "2 running, 1 queued",
        ],
    ]
    assert lines[3].startswith("gone")
    assert "gone, seen" in lines[3]


def test_peers_tells_more_of_how_each_is_reached_if_asked(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    via = "relay bootstrap-1 after 0.09 s, then TCP simultaneous open after 0.31 s"
    nodes = {A: NODES[A], B: {**NODES[B], "path": "punched-tcp", "path_via": via}}
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": nodes})
    assert main(["peers", "--verbose"]) == 0
    header, ours, theirs = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "VIA"
    assert ours.endswith(" -")
    assert " punched-tcp " in theirs
    assert theirs.endswith(via)


RELAYED = f"/ip4/203.0.113.9/tcp/11435/p2p/{C}/p2p-circuit"
NEAR, LOOP = "/ip4/10.0.0.1/tcp/11435", "/ip6/::1/tcp/11435"


@pytest.mark.parametrize(
    ("status", "path", "used", "told", "shown"),
    [
        ("online", "relay", RELAYED, (NEAR,), "relay 203.0.113.9"),
        ("online", "punched-tcp", "/ip4/81.2.69.142/tcp/4444", (NEAR, RELAYED), "/ip4/81.2.69.142/tcp/4444"),
        ("online", "direct", "/ip4/10.0.0.1/tcp/50123", (RELAYED, NEAR), NEAR),
        ("online", "direct", "/ip6zone/eth0/ip6/fe80::1/tcp/1", (), "/ip6zone/eth0/ip6/fe80::1/tcp/1"),
        ("self", "self", "", (LOOP, RELAYED, NEAR), NEAR),
        ("self", "self", "", (LOOP, RELAYED), "over relay 203.0.113.9"),
        ("self", "self", "", (LOOP,), LOOP),
        ("offline", "direct", "", (RELAYED, NEAR), NEAR),
        ("offline", "direct", "", (), "-"),
    ],
)
def test_peers_shows_the_address_that_is_in_use(
    fake_peer: FakePeer,
    capsys: pytest.CaptureFixture[str],
    status: str,
    path: str,
    used: str,
    told: tuple[str, ...],
    shown: str,
) -> None:
    told = tuple(f"{text}/p2p/{B}" for text in told)
    fake_peer.on(
        "GET", "/api/v1/nodes", {"nodes": {B: node(B, "box", status, path=path, address=used, addresses=told)}}
    )
    assert main(["peers"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.partition(B)[2].strip().startswith(f"{shown}  ")


def test_status_names_relays_by_their_addresses_where_they_are_no_members(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [{"address": f"/ip4/203.0.113.9/tcp/11435/p2p/{D}", "source": "config"}]
    relays = {"reachability": REACHABILITY | {"relays": [D, E]}, "bootstrap": known}
    fake_peer.on("GET", "/api/v1/status", STATUS | relays)
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on("GET", "/api/v1/models", {"models": {}})
    assert main(["status"]) == 0
    assert f"relayed by    203.0.113.9, {E}" in capsys.readouterr().out.splitlines()


def test_peers_as_json_is_what_the_interface_says(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    assert main(["peers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": NODES}


STATUS = {
    "node_id": A, "name": "here", "version": "0.1.0", "state": "running", "mesh": "", "connections": 1,
    "addresses": ["/ip4/10.0.0.1/tcp/11435/p2p/" + A, "/ip6/::1/tcp/11435/p2p/" + A], "uptime": 185 * 10**9,
    "resources": {"cpu_percent": 3.2, "memory_bytes": 1_200_000_000, "memory_total_bytes": 16_000_000_000,
                  "disk_free_bytes": 120_000_000_000, "gpus": []},
}  # fmt: skip


def test_status_tells_how_the_peer_is(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/status", STATUS)
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on(
        "GET", "/api/v1/models", {"models": {"x": {"name": "x", "local": True}, "y": {"name": "y", "local": False}}}
    )
    assert main(["status"]) == 0
    assert capsys.readouterr().out == (
        "name          here\n"
        f"peer id       {A}\n"
        "version       0.1.0\n"
        "state         running, for 3 minutes\n"
        "mesh          open LAN mesh\n"
        f"api           {fake_peer.url}\n"
        f"address       /ip4/10.0.0.1/tcp/11435/p2p/{A}\n"
        f"              /ip6/::1/tcp/11435/p2p/{A}\n"
        "peers         1 online\n"
        "models        1 here, 2 in the mesh\n"
        "cpu           3 %\n"
        "memory        1.2 GB of 16 GB\n"
        "disk free     120 GB\n"
        "gpu           none\n"
    )


def test_status_says_that_a_bootstrap_node_is_not_used(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    off = {"name": "rendezvous", "state": "off", "problem": BOOTSTRAP_OUTSIDE, "found": 0}
    fake_peer.on("GET", "/api/v1/status", STATUS | {"discovery": [off]})
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on("GET", "/api/v1/models", {"models": {}})
    assert main(["status"]) == 0
    assert f"bootstrap     not used: {BOOTSTRAP_OUTSIDE}" in capsys.readouterr().out.splitlines()


def test_docs_lists_its_pages_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "--json"]) == 0
    pages = json.loads(capsys.readouterr().out)
    for page in pages:
        assert main(["docs", page]) == 0
        assert capsys.readouterr().out.strip()


def test_docs_of_an_unknown_page_says_how_to_list_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "../../etc/passwd"]) == 3
    assert "`meshmax docs` lists the pages" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["0021", "decisions/0021", "decisions/0021.md"])
def test_docs_finds_a_decision_by_its_number(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"].startswith("decisions/0021-")


def test_docs_names_the_pages_that_a_beginning_could_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "decisions/000"]) == 3
    error = capsys.readouterr().err
    assert "decisions/0001-ollama-layout" in error
    assert "begin so" in error


def test_status_tells_models_of_the_store_from_those_of_engines_beside_it(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    backends = [{"engine": "ollama", "origin": "the Ollama at http://x", "models": 1, "problem": ""}]
    fake_peer.on("GET", "/api/v1/status", STATUS | {"backends": backends, "reachability": {"lan": False}})
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    models = {
        "x": {"name": "x", "local": True, "servers": [A]},
        "y": {"name": "y", "local": False, "servers": [A]},
        "z": {"name": "z", "local": False, "servers": [B]},
    }
    fake_peer.on("GET", "/api/v1/models", {"models": models})
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "models        1 here and 1 of the engines below, 3 in the mesh" in lines
    assert "engine        the Ollama at http://x: 1 model" in lines
    assert "mesh          open, not announced on the LAN (--no-lan)" in lines


def test_status_names_what_an_interrupted_pull_left_and_what_can_be_done(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    partials = [{"name": "big:8b", "here_bytes": 1_300_000_000, "size_bytes": 4_900_000_000}]
    fake_peer.on("GET", "/api/v1/status", STATUS | {"partials": partials})
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on("GET", "/api/v1/models", {"models": {}})
    assert main(["status"]) == 0
    line = "partial       1.3 GB of big:8b (4.9 GB); `meshmax pull big:8b` goes on, `meshmax rm big:8b` frees it"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("state", "further"),
    [
        ("paused", "paused, `meshmax transfers resume t7` goes on, `meshmax transfers cancel t7` gives it up"),
        ("waiting", "waiting, `meshmax transfers` says what for"),
    ],
)
def test_status_names_what_a_pull_that_halts_has_already(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str], state: str, further: str
) -> None:
    part = {
        "name": "big:8b",
        "here_bytes": 1_300_000_000,
        "size_bytes": 4_900_000_000,
        "transfer": "t7",
        "state": state,
    }
    fake_peer.on("GET", "/api/v1/status", STATUS | {"partials": [part]})
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on("GET", "/api/v1/models", {"models": {}})
    assert main(["status"]) == 0
    assert f"partial       1.3 GB of big:8b (4.9 GB); {further}" in capsys.readouterr().out.splitlines()


REACHABILITY = {
    "addresses": 2, "lan": True, "state": "mapped", "why": "2 observers reached us at 81.2.69.142:4444", "udp_blocked": False,
    "nat": {"udp": "open", "mapping": "endpoint-independent", "filtering": "unknown", "tcp_mapping": "address-dependent"},
    "external_ips": ["81.2.69.142"], "reached_at": ["/ip4/81.2.69.142/tcp/4444"], "relays": [B],
    "mappings": [{"protocol": "tcp", "port": 11435, "external": "81.2.69.142:4444", "by": "upnp", "expires_in_s": 60}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {},
            [
                "reachable     through the router: 2 observers reached us at 81.2.69.142:4444",
                "nat           UDP open, mapping endpoint-independent, TCP mapping address-dependent",
                "mapping       tcp 11435 at 81.2.69.142:4444, by upnp",
                "relayed by    box",
            ],
        ),
        (
            {"state": "private", "why": "no", "nat": {}, "mappings": [], "relays": []},
            ["reachable     not directly: no"],
        ),
        (
            {"state": "private", "why": "no", "nat": {}, "mappings": [], "relays": [], "mapping_why": "no router here"},
            ["reachable     not directly: no", "mapping       none: no router here"],
        ),
        ({"state": "unknown", "why": "nobody", "nat": {}, "mappings": [], "relays": []}, []),
    ],
)
def test_status_tells_where_the_peer_stands(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], lines: list[str]
) -> None:
    fake_peer.on("GET", "/api/v1/status", STATUS | {"reachability": REACHABILITY | changes})
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": NODES})
    fake_peer.on("GET", "/api/v1/models", {"models": {}})
    assert main(["status"]) == 0
    out = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(out) if line.startswith("peers  "))
    assert [line for line in out[:start] if line.split()[0] in ("reachable", "nat", "mapping", "relayed")] == lines
