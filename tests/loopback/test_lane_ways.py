"""Lanes that begin as a connection made otherwise than to the lane port: punched ones, strangers', half-open ones."""

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from meshmax.base.errors import ConnectError, PeerGone
from meshmax.base.traversal import Candidate
from meshmax.net import lanes as module
from meshmax.net import limits
from meshmax.net.lane import TcpFetchLane, TcpServeLane
from meshmax.net.lanes import MAX_TAKEN
from meshmax.net.punch import TcpPuncher, TcpPunchPort
from meshmax.net.tcp import TcpBytes, TcpTransport
from meshmax.ports import ByteStream
from meshmax.testing.memory_lanes import NoBytes
from meshmax.wire.lane import LaneGrant
from meshmax.wire.lane_frames import HELLO_BYTES
from tests.loopback.lane_site import DIGEST, FETCHER, PROMPTLY_S, SERVER, Site, chunk_of, quietly, read, site

pytestmark = pytest.mark.loopback


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[TcpBytes, TcpBytes]]:
    """Both ends of a connection of this machine, closed at the end whoever owns them."""
    listener = await TcpTransport().listen("127.0.0.1", 0)
    one = await TcpTransport().connect(*listener.local)
    other = await listener.accept()
    listener.close()
    try:
        yield one, other
    finally:
        one.close()
        other.close()


async def one_of(stream: ByteStream) -> ByteStream:
    await trio.lowlevel.checkpoint()
    return stream


async def fetch(here: Site, lane: TcpFetchLane, served: TcpServeLane, count: int) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quietly, partial(served.run, read))
        nursery.start_soon(lane.run, here.sink, here.tell)
        lane.want(DIGEST, range(count))
        await here.hear(count)
        lane.close()
    assert here.sunk == {index: chunk_of(index) for index in range(count)}


async def punched(port: TcpPunchPort, other: TcpPunchPort, streams: trio.MemorySendChannel[ByteStream]) -> None:
    await port.run([Candidate("srflx", "tcp", "127.0.0.1", other.port)], streams)


async def test_a_lane_goes_through_a_simultaneous_open() -> None:
    async with site() as here, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        puncher = TcpPuncher(loopback=True)
        one = await stack.enter_async_context(puncher.open_port([]))
        other = await stack.enter_async_context(puncher.open_port([]))
        to_one, ours = trio.open_memory_channel[ByteStream](math.inf)
        to_other, theirs = trio.open_memory_channel[ByteStream](math.inf)
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected, trio.fail_after(PROMPTLY_S):
            nursery.start_soon(punched, one, other, to_one)
            nursery.start_soon(punched, other, one, to_other)
            stream = await theirs.receive()
            nursery.start_soon(here.server.take, stream)
            lane = await here.fetcher.connect(SERVER, ours.receive, ask, expected.grant)
            served = await expected.arrive()
        await fetch(here, lane, served, 8)
        nursery.cancel_scope.cancel()


async def test_a_stranger_becomes_no_lane_and_keeps_nobody_out() -> None:
    async with site() as here, connection() as (stranger, strange), connection() as (ours, theirs):
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected, trio.fail_after(PROMPTLY_S):
            await stranger.send_all(expected.grant.lane_id + bytes(HELLO_BYTES - len(expected.grant.lane_id)))
            await here.server.take(strange)
            with suppress(trio.BrokenResourceError):
                assert await stranger.receive_some(1) == b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.server.take, theirs)
                lane = await here.fetcher.connect(SERVER, partial(one_of, ours), ask, expected.grant)
            served = await expected.arrive()
        await fetch(here, lane, served, 2)


async def test_one_who_proves_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.1)
    async with site() as here, connection() as (stranger, strange):
        with trio.fail_after(PROMPTLY_S):
            await stranger.send_all(b"half")
            await here.server.take(strange)
            assert await stranger.receive_some(1) == b""


async def test_those_who_prove_themselves_at_once_are_bounded() -> None:
    async with site() as here, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        pairs = [await stack.enter_async_context(connection()) for _ in range(MAX_TAKEN + 1)]
        for _, strange in pairs[:-1]:
            nursery.start_soon(here.server.take, strange)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(PROMPTLY_S):
            await here.server.take(pairs[-1][1])
            assert await pairs[-1][0].receive_some(1) == b""
        nursery.cancel_scope.cancel()


async def test_a_fetcher_whose_way_leads_to_a_stranger_or_nowhere_has_no_lane_and_holds_no_place() -> None:
    async with site() as here, connection() as (ours, strange):
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected, trio.fail_after(PROMPTLY_S):
            strange.close()
            with pytest.raises(ConnectError):
                await here.fetcher.connect(SERVER, partial(one_of, ours), ask, expected.grant)

        async def nowhere() -> ByteStream:
            await trio.lowlevel.checkpoint()
            raise PeerGone("not there")

        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected, pytest.raises(PeerGone, match="not there"):
            await here.fetcher.connect(SERVER, nowhere, ask, expected.grant)
        assert here.fetcher.count == 0


async def test_a_stream_without_a_socket_becomes_no_lane() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        stream = NoBytes("11.22.33.44", 1)
        with here.server.expect(FETCHER, ask) as expected, pytest.raises(ConnectError):
            await here.fetcher.connect(SERVER, partial(one_of, stream), ask, expected.grant)
        assert stream.closed


async def test_from_outside_a_lane_goes_to_the_port_that_a_router_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    async with site() as here:
        here.server.external_port = here.server.port
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected, trio.fail_after(PROMPTLY_S):
            grant = expected.grant
            grant = LaneGrant(grant.lane_id, grant.secret, grant.cipher, 1, grant.external_port)
            with pytest.raises(ConnectError, match="port 1:"):
                await here.fetcher.dial("127.0.0.1", grant)  # on a LAN the router is not in between
            monkeypatch.setattr(module, "is_lan_address", lambda ip: False)
            lane = await here.fetcher.connect(SERVER, "127.0.0.1", ask, grant)
            served = await expected.arrive()
        await fetch(here, lane, served, 2)
