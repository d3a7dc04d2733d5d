"""`meshmax bootstrap` as a process: how it starts, what it answers, what it costs, how it ends and comes back."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio
import yaml

from meshmax.base.ids import parse_peer_id
from meshmax.core.rendezvous import bootstrap_nodes
from meshmax.net.swarm import open_swarm
from meshmax.services.observe import ask_observed
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.process import meet, peers, until
from meshmax.wire import stun
from tests.loopback.bootstrap_site import Point

pytestmark = pytest.mark.loopback

END_WITHIN_S, SLACK_S = 2.0, 10.0  # the machine may be slow, and busy with other tests
MAX_RESIDENT_BYTES = 150 << 20
GUESTS = 200


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Point]:
    started = Point(tmp_path_factory.mktemp("bootstrap") / "home")
    try:
        assert started.address
        yield started
    finally:
        started.kill()


def ask_udp(port: int) -> tuple[stun.BindingAnswer, tuple[str, int]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(("127.0.0.1", port))
        sock.send(stun.encode_request(b"udp transact"))
        return stun.parse_answer(sock.recv(2048), b"udp transact"), sock.getsockname()


def test_the_banner_has_the_lines_that_other_sites_copy(point: Point) -> None:
    text = point.log.read_text()
    facts = point.facts
    assert f"bootstrap node {facts['peer_id']}" in text
    copied = yaml.safe_load(re.findall(r"^bootstrap:\n(?:  - .*\n)+", text, re.MULTILINE)[0])
    assert copied["bootstrap"] == facts["addresses"]
    assert set(bootstrap_nodes(copied["bootstrap"])) == {facts["peer_id"]}
    assert (
        abs(facts["udp_port"] - int(facts["addresses"][0].split("/")[4])) < 64
    )  # the same number, or the next free one
    assert set(facts["services"]) == {"rendezvous", "stun", "observer", "relay", "dht"}
    assert f"UDP port {facts['udp_port']}" in text
    assert stat.S_IMODE((point.home / "identity.key").stat().st_mode) == 0o600


def test_stun_is_answered_by_udp_with_the_address_of_the_asker(point: Point) -> None:
    answer, own = ask_udp(point.facts["udp_port"])
    assert answer.mapped == own


def test_the_observer_answers_by_tcp_as_often_as_it_is_asked_on_a_connection(point: Point) -> None:
    with socket.create_connection(("127.0.0.1", point.facts["observer_port"]), timeout=60) as sock:
        for number in range(3):
            transaction = bytes([number]) * 12
            sock.sendall(stun.encode_request(transaction))
            data = b""
            while len(data) < 20 or len(data) < stun.message_length(data[:20]):
                data += sock.recv(1000)
            assert stun.parse_answer(data, transaction).mapped == sock.getsockname()


def test_what_is_no_stun_ends_a_connection_to_the_observer(point: Point) -> None:
    with socket.create_connection(("127.0.0.1", point.facts["observer_port"]), timeout=60) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(100) == b""


def test_a_stun_client_that_is_not_ours_is_answered_too(point: Point) -> None:
    ice = pytest.importorskip("aioice.ice")

    async def ask() -> Any:
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_datagram_endpoint(
            lambda: ice.StunProtocol(ice.Connection(ice_controlling=True)), local_addr=("127.0.0.1", 0)
        )
        request = ice.stun.Message(ice.stun.Method.BINDING, ice.stun.Class.REQUEST)
        response, _ = await protocol.request(request, ("127.0.0.1", point.facts["udp_port"]))
        own = protocol.transport.get_extra_info("sockname")
        await protocol.close()
        return response.attributes["XOR-MAPPED-ADDRESS"], own

    mapped, own = asyncio.run(ask())
    assert mapped == own


async def test_a_guest_is_told_where_it_comes_from_and_which_ports_there_are(point: Point) -> None:
    facts = await trio.to_thread.run_sync(lambda: point.facts)
    async with open_swarm(SeededSigner(1).private_bytes, [("127.0.0.1", 0)]) as swarm:
        peer_id = parse_peer_id(facts["peer_id"])
        with trio.fail_after(60):
            await swarm.dial(peer_id, facts["addresses"], guest=True)
            observed = await ask_observed(swarm, peer_id)
    assert observed.address.startswith("/ip4/127.0.0.1/tcp/")
    assert (observed.udp_port, observed.observer_port) == (facts["udp_port"], facts["observer_port"])
    assert set(observed.services) == set(facts["services"])


def test_figures_are_for_this_machine_and_nothing_else_is_served(point: Point) -> None:
    with httpx.Client(base_url=point.api, trust_env=False) as client:
        assert "meshmax_stun_total" in client.get("/metrics").text
        assert client.get("/api/v1/status").status_code == 404
        assert client.post("/health").status_code == 405
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
        assert client.head("/health").content == b""


def test_a_second_one_on_the_same_home_is_refused_and_the_first_lives_on(point: Point) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "meshmax.cli.main", "bootstrap", "--home", str(point.home), "--listen", "127.0.0.1:0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"(pid {point.process.pid}) is running on {point.home}" in second.stderr
    assert point.facts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_within_two_seconds(tmp_path: Path, number: int) -> None:
    point = Point(tmp_path / "home")
    try:
        port = point.facts["observer_port"]
        with socket.create_connection(("127.0.0.1", port), timeout=60):
            began_s = time.monotonic()
            point.process.send_signal(number)
            assert point.process.wait(60) == 0, point.log.read_text()
            assert time.monotonic() - began_s < END_WITHIN_S + SLACK_S
        assert "Traceback" not in point.log.read_text()
        assert not (point.home / "run.json").exists()
    finally:
        point.kill()


def test_figures_beyond_this_machine_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshmax.cli.main", "bootstrap", "--home", str(tmp_path), "--api", "0.0.0.0:0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "not on loopback" in done.stderr


async def test_two_hundred_guests_fit_into_little_memory(tmp_path: Path) -> None:
    point = await trio.to_thread.run_sync(Point, tmp_path / "home")
    try:
        facts = await trio.to_thread.run_sync(lambda: point.facts)
        peer_id = parse_peer_id(facts["peer_id"])
        process = psutil.Process(point.process.pid)
        before = process.memory_info().rss
        async with AsyncExitStack() as stack:
            limiter = trio.CapacityLimiter(8)

            async def visit(seed: int) -> None:
                async with limiter:
                    swarm = swarms[seed]
                    await swarm.dial(peer_id, facts["addresses"], guest=True)
                    await ask_observed(swarm, peer_id)

            swarms = [
                await stack.enter_async_context(open_swarm(SeededSigner(seed + 1).private_bytes, [("127.0.0.1", 0)]))
                for seed in range(GUESTS)
            ]
            with trio.fail_after(400):
                async with trio.open_nursery() as nursery:
                    for seed in range(GUESTS):
                        nursery.start_soon(visit, seed)
            full = process.memory_info().rss
        print(f"resident: {before >> 20} MiB alone, {full >> 20} MiB with {GUESTS} guests")
        assert full < MAX_RESIDENT_BYTES
    finally:
        point.kill()


def test_after_a_crash_it_comes_back_as_itself_and_peers_register_again(tmp_path: Path) -> None:
    point = Point(tmp_path / "home")
    try:
        facts = point.facts
        address = point.address
        listen = f"127.0.0.1:{address.split('/')[4]}"
        settings = {"lan": "false", "bootstrap": address}
        with peers(tmp_path, "a", **settings) as (a,):
            until("a has registered", lambda: registrations(point) == 1)
            point.kill()
            point = Point(tmp_path / "home", listen=listen)
            assert point.facts["peer_id"] == facts["peer_id"]
            assert point.address == address
            with peers(tmp_path, "b", **settings) as (b,):
                meet(a, b)
    finally:
        point.kill()


def registrations(point: Point) -> int:
    text = httpx.get(point.api + "/metrics", timeout=60, trust_env=False).text
    found = re.findall(r"^meshmax_registrations (\S+)$", text, re.MULTILINE)
    return int(float(found[0])) if found else 0


def test_an_ordinary_peer_serves_strangers_as_well_when_it_is_told_to(tmp_path: Path) -> None:
    serving = {"serve_stun": "true", "serve_observer": "true", "serve_rendezvous": "true"}
    ports = {"dht_port": "0", "observer_port": "0"}
    with peers(tmp_path, "host", lan="false", **serving, **ports) as (host,):
        address = host.get("/api/v1/status")["addresses"][0]
        peer_id = parse_peer_id(host.peer_id)

        async def observe() -> Any:
            async with open_swarm(SeededSigner(3).private_bytes, [("127.0.0.1", 0)]) as swarm:
                with trio.fail_after(60):
                    await swarm.dial(peer_id, [address], guest=True)
                    return await ask_observed(swarm, peer_id)

        observed = trio.run(observe)
        assert set(observed.services) == {"stun", "observer", "rendezvous"}
        answer, own = ask_udp(observed.udp_port)
        assert answer.mapped == own
        with peers(tmp_path, "a", "b", lan="false", bootstrap=address) as (a, b):
            meet(a, b)
