"""Data channels over a TURN server, by UDP and by TCP, and TURN servers that are none."""

from __future__ import annotations

import pytest
import trio

from meshmax.base.traversal import TurnServer
from meshmax.net.addresses import running_addresses
from meshmax.net.ice import GATHER_TURN_S
from meshmax.wire.sdp import decode
from tests.loopback.ice_site import PROMPTLY_S, meet, read, site
from tests.loopback.turn_server import PASSWORD, USER, open_turn_server

pytestmark = pytest.mark.loopback


def _ipv4() -> str:
    return next(ip for ip in running_addresses() if ":" not in ip)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_a_channel_over_a_turn_server_carries_bytes_and_gives_the_allocation_back(transport: str) -> None:
    async with site() as channels, open_turn_server(_ipv4()) as server:
        turn = [TurnServer(f"turn:{server.ip}:{server.port}?transport={transport}", USER, PASSWORD)]
        async with channels.open_channel([], turn) as one, channels.open_channel([]) as other:
            await meet(one, other)
            with trio.fail_after(PROMPTLY_S):
                ends = await one.connected(), await other.connected()
        assert (server.allocations, bool(server.by_tcp)) == (1, transport == "tcp")
        first, second = ends
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.send_all, bytes(300_000))
            assert await read(second, 300_000) == bytes(300_000)  # type: ignore[arg-type]
        await second.send_all(b"and back")
        assert await read(first, 8) == b"and back"  # type: ignore[arg-type]
        first.close()
        second.close()
        with trio.fail_after(PROMPTLY_S):
            while server.allocations:  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.01)


async def test_with_a_turn_server_nothing_but_its_address_is_offered() -> None:
    async with site() as channels, open_turn_server(_ipv4()) as server:
        turn = [TurnServer(f"turn:{server.ip}:{server.port}", USER, PASSWORD)]
        async with channels.open_channel([(_ipv4(), 9)], turn) as one:
            found = decode(await one.offer()).candidates
        assert [(each.kind, each.ip) for each in found] == [("relay", server.ip)]


@pytest.mark.parametrize("kind", ["silent", "closed", "refusing", "nonsense"])
async def test_a_turn_server_that_is_none_offers_nothing_and_holds_nobody_up(kind: str) -> None:
    async with site() as channels, open_turn_server(_ipv4()) as server, channels.open_channel([]):
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as silent:
            await silent.bind((_ipv4(), 0))
            url, password = {
                "silent": (f"turn:{_ipv4()}:{silent.getsockname()[1]}", PASSWORD),
                "closed": (f"turn:{_ipv4()}:9?transport=tcp", PASSWORD),
                "refusing": (f"turn:{server.ip}:{server.port}", "wrong"),
                "nonsense": ("turn:", PASSWORD),
            }[kind]
            begun_s = trio.current_time()
            async with channels.open_channel([], [TurnServer(url, USER, password)]) as one:
                assert decode(await one.offer()).candidates == ()
            assert trio.current_time() - begun_s < GATHER_TURN_S + 10
