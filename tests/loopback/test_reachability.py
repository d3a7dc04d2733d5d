"""Where we stand, asked of real bootstrap nodes over real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshmax.base.config import Config, ServeConfig
from meshmax.core.rendezvous import bootstrap_nodes
from meshmax.net.probes import SocketProbes
from meshmax.net.swarm import LibrarySwarm, open_swarm
from meshmax.node.bootstrap import BootstrapNode, open_bootstrap
from meshmax.node.whereabouts import control_port_of
from meshmax.services.reachability import ReachabilityService, open_reachability
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.process import peers
from meshmax.testing.process import until as until_true
from meshmax.wire.voucher import vouches
from tests.loopback.bootstrap_site import points

pytestmark = pytest.mark.loopback

ALL = ServeConfig(rendezvous=True, stun=True, observer=True, relay=True)


@asynccontextmanager
async def bootstraps(folder: Path, *hosts: str) -> AsyncIterator[list[BootstrapNode]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                open_bootstrap(
                    Config(home=str(folder / str(n)), listen=(f"{host}:0",), observer_port=0, dht_port=0, serve=ALL)
                )
            )
            for n, host in enumerate(hosts)
        ]


def service(swarm: LibrarySwarm, nodes: list[BootstrapNode], **more: object) -> ReachabilityService:
    addresses = [address for node in nodes for address in node.addresses]
    return ReachabilityService(
        swarm,
        lambda: bootstrap_nodes(addresses),
        tuple,
        lambda: control_port_of(swarm.addresses),
        time.time,
        probes=SocketProbes(),
        **more,  # type: ignore[arg-type]
    )


async def until(what: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not what():  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.02)


async def test_two_bootstrap_nodes_tell_all_there_is_to_know(tmp_path: Path) -> None:
    async with (
        bootstraps(tmp_path, "127.0.0.1", "127.0.0.2") as nodes,
        open_swarm(SeededSigner(1).private_bytes, [("127.0.0.1", 0)]) as swarm,
        open_reachability(service(swarm, nodes)) as where,
    ):
        began = time.monotonic()
        await until(lambda: "2 observers" in where.view.why)  # one that is late is asked again
        took_s = time.monotonic() - began
        view = where.view
        assert (view.state, view.external_ips) == ("public", ("127.0.0.1",)), view
        assert view.addresses == (swarm.addresses[0].partition("/p2p/")[0],)
        assert view.nat.udp == "open"
        assert view.nat.mapping == view.nat.tcp_mapping == view.nat.filtering == "endpoint-independent"
        assert {ip for ip, _ in where.stun} == {"127.0.0.1", "127.0.0.2"}
        assert {port for _, port in where.tcp_observers} == {node.serving.observer_port for node in nodes}
        known = {node.peer_id for node in nodes}
        assert {signed.signer for signed in where.vouchers} == known
        assert vouches(swarm.peer_id, "127.0.0.1", where.vouchers, known, time.time())
        assert not where.udp_blocked
        print(f"known after {took_s:.2f} s")


async def test_a_port_that_somebody_else_listens_at_is_not_ours(tmp_path: Path) -> None:
    async with (
        bootstraps(tmp_path, "127.0.0.1") as nodes,
        open_swarm(SeededSigner(1).private_bytes, [("127.0.0.1", 0)]) as swarm,
        open_swarm(SeededSigner(2).private_bytes, [("127.0.0.1", 0)]) as other,
    ):
        addresses = [address for node in nodes for address in node.addresses]
        others_port = control_port_of(other.addresses)
        wrong = ReachabilityService(
            swarm, lambda: bootstrap_nodes(addresses), tuple, lambda: others_port, time.time, probes=SocketProbes()
        )
        async with open_reachability(wrong) as where:
            await until(lambda: where.view.state != "unknown")
            assert where.view.state == "private"
        async with open_reachability(service(swarm, nodes)) as where:
            await until(lambda: where.view.state != "unknown")
            assert where.view.state == "public"
        assert len(swarm.connections()) == 0  # who knocks leaves again


async def test_a_node_that_is_gone_and_a_stun_server_that_is_deaf_are_borne(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))

        async def stun() -> list[tuple[str, int]]:
            await trio.lowlevel.checkpoint()
            return [deaf.getsockname()]

        async with (
            bootstraps(tmp_path, "127.0.0.1") as nodes,
            open_swarm(SeededSigner(1).private_bytes, [("127.0.0.1", 0)]) as swarm,
        ):
            gone = f"/ip4/127.0.0.1/tcp/1/p2p/{SeededSigner(7).peer_id}"
            addresses = [gone, *nodes[0].addresses]
            more = ReachabilityService(
                swarm, lambda: bootstrap_nodes(addresses), tuple, lambda: control_port_of(swarm.addresses), time.time,
                probes=SocketProbes(), stun=stun,
            )  # fmt: skip
            async with open_reachability(more) as where:
                await until(lambda: where.view.state != "unknown")
                assert (where.view.state, where.view.nat.udp) == ("public", "open")
                assert "the only observer" in where.view.why


def test_a_real_peer_shows_where_it_stands(tmp_path: Path) -> None:
    with points(tmp_path, "one", "two") as nodes:
        addresses = ",".join(node.address for node in nodes)
        with peers(tmp_path, "a", lan="false", bootstrap=addresses) as (a,):
            asked = lambda: a.get("/api/v1/status")["reachability"]["nat"]["mapping"] != "unknown"  # noqa: E731
            until_true("it knows where it stands, and both nodes were heard", asked)
            where = a.get("/api/v1/status")["reachability"]
            assert (where["nat"]["udp"], where["external_ips"], where["udp_blocked"]) == ("open", ["127.0.0.1"], False)
            text = a.run("status").stdout
            assert "reachable     yes: " in text
            assert "nat           UDP open, mapping endpoint-independent" in text
            assert "others outside reach this peer" in a.run("doctor", check=False).stdout
            assert not (a.home / "networks.json").exists()  # nothing is blocked
