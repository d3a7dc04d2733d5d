"""`meshmax doctor` with real processes: good health, being alone, another mesh, a port that others cannot reach, no peer."""

import ipaddress
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshmax.net.addresses import is_lan_address
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until

pytestmark = pytest.mark.loopback

OWN = {"no_network", "disk_low", "disk_full", "engine_missing"}  # this machine may have no network, and little room


def lan_host() -> str:
    """An address of this machine beside loopback at which an open mesh may be met; '' where there is none."""
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    ips = [text for text in found if text.count(".") == 3 or (":" in text and "%" not in text and len(text) != 17)]
    ip = next((ip for ip in ips if is_lan_address(ip) and not ipaddress.ip_address(ip).is_loopback), "")
    return f"[{ip}]" if ":" in ip else ip


def doctor(peer: PeerProcess) -> tuple[int, dict[str, Any]]:
    done = peer.run("doctor", "--json", check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def codes(diagnosis: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in diagnosis["findings"] if finding["severity"] != "ok"} - OWN


def test_two_peers_that_see_each_other_are_well(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        for peer, other in ((a, "b"), (b, "a")):
            code, diagnosis = doctor(peer)
            assert codes(diagnosis) == set()
            assert (code == 0) == diagnosis["well"]
            assert diagnosis["took_s"] < 30
            told = {each["name"]: each for each in diagnosis["facts"]["peer"]["looked_back"]}[other]
            assert "mdns" in {seen["rung"] for seen in told["ours"]}
            assert "mdns" in {seen["rung"] for seen in told["theirs"]}
            assert {port["kind"]: port["outcome"] for port in told["ports"]} == {
                "control": "open",
                "lane": "open",
                "udp": "arrived",
            }
            rungs = {look["report"]["name"]: look for look in diagnosis["facts"]["peer"]["rungs"]}
            assert rungs["mdns"]["found_now"] >= 1
        shown = a.run("doctor", check=False)
        assert "WE SEE IT BY" in shown.stdout
        assert "looking at this machine" in shown.stderr
        assert any("mdns" in line for line in a.run("status").stdout.splitlines() if line.startswith("found by"))


def test_a_peer_alone_and_a_home_without_a_peer_are_told_what_to_do(tmp_path: Path) -> None:
    alone = start_peer(tmp_path / "a", "--no-lan")
    try:
        code, diagnosis = doctor(alone)
        assert (code, "alone" in codes(diagnosis)) == (1, True)
        assert all(finding["advice"] for finding in diagnosis["findings"] if finding["severity"] != "ok")
        states = {look["report"]["name"]: look["report"]["state"] for look in diagnosis["facts"]["peer"]["rungs"]}
        assert states["mdns"] == "off"
    finally:
        alone.stop()
    code, diagnosis = doctor(alone)
    assert (code, diagnosis["facts"]["peer"]) == (1, None)
    assert "no_peer_running" in codes(diagnosis)
    assert "start one with `meshmax peer`" in alone.run("doctor", check=False).stdout


def test_a_peer_of_another_mesh_is_named_as_such(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        b.run("mesh", "new", "elsewhere")
        until("a is alone", lambda: b.peer_id not in a.neighbours())

        def told() -> dict[str, Any] | None:
            _, diagnosis = doctor(a)
            found = [each for each in diagnosis["findings"] if each["code"] == "other_mesh"]
            return found[0] if found else None

        finding = until("a is told of b's mesh", told, 60)
        assert finding is not None
        assert b.peer_id[-8:] in finding["sentence"]


@pytest.mark.skipif(not lan_host(), reason="this machine has no private address beside loopback")
def test_a_port_that_is_open_on_this_machine_alone_is_found_unreachable(tmp_path: Path) -> None:
    with peers(tmp_path, "b", lan="false", listen=f"{lan_host()}:0") as (b,):
        address = b.get("/api/v1/status")["addresses"][0]
        a = start_peer(tmp_path / "a", "--name", "a", "--join", address, lan="false")
        try:
            until("a sees b", lambda: b.peer_id in a.neighbours())
            code, diagnosis = doctor(a)
            assert code == 1
            assert "port_unreachable" in codes(diagnosis)
            (finding,) = [each for each in diagnosis["findings"] if each["code"] == "port_unreachable"]
            assert "b: refused" in finding["sentence"]
            assert "leave out `listen`" in finding["advice"]
            assert codes(doctor(b)[1]) == set()
        finally:
            a.stop()
