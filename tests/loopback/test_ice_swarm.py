"""Two real swarms over a data channel: Noise and Yamux above it are as they are over TCP, and so are their ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import aioice.ice
import pytest
import trio

from meshmax.base.errors import ConnectError, PeerGone
from meshmax.net.ice import IceStream
from meshmax.net.swarm import open_swarm
from meshmax.ports import Stream, Swarm
from meshmax.testing.memory_swarm import SeededSigner
from tests.loopback.ice_site import pair, site

pytestmark = pytest.mark.loopback

KEYS = [SeededSigner(seed).private_bytes for seed in range(1, 4)]
ECHO = "/meshmax/echo/1.0.0"
BYTES = 5 << 20


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)
    await stream.send_eof()


async def adopt(swarm: Swarm, stream: IceStream, other: Swarm, direction: str) -> None:
    address = f"/ip4/{stream.remote[0]}/udp/{stream.remote[1]}"
    await swarm.adopt(stream, other.peer_id, direction, "punched-udp", address)  # type: ignore[arg-type]


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Swarm, Swarm, IceStream, IceStream]]:
    """Two swarms whose only connection is a data channel, and its ends."""
    async with (
        site() as channels,
        open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a,
        open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b,
        pair(channels) as (one, other),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adopt, a, one, b, "out")
            nursery.start_soon(adopt, b, other, a, "in")
        yield a, b, one, other


async def test_five_megabytes_come_back_whole() -> None:
    async with joined() as (a, b, _, _):
        b.serve(ECHO, echo, to="anyone")
        assert a.connections()[b.peer_id].path == "punched-udp"
        stream = await a.open_stream(b.peer_id, ECHO)
        sent = bytes(range(256)) * (BYTES // 256)
        got = bytearray()

        async def send() -> None:
            await stream.send_all(sent)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while data := await stream.receive_some(65536):
                got += data
        assert bytes(got) == sent


async def test_a_stalled_reader_stalls_its_stream_alone() -> None:
    async def stall(stream: Stream) -> None:
        await trio.sleep_forever()

    async with joined() as (a, b, _, _):
        b.serve("/meshmax/stall/1.0.0", stall, to="anyone")
        b.serve(ECHO, echo, to="anyone")
        stalled = await a.open_stream(b.peer_id, "/meshmax/stall/1.0.0")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stalled.send_all, bytes(2 << 20))
            await trio.sleep(0.5)
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(b"still here")
            with trio.fail_after(60):
                assert await stream.receive_some(100) == b"still here"
            nursery.cancel_scope.cancel()
        await stalled.reset()


async def test_a_half_closed_stream_still_answers() -> None:
    async def count(stream: Stream) -> None:
        total = 0
        while data := await stream.receive_some(65536):
            total += len(data)
        await stream.send_all(str(total).encode())

    async with joined() as (a, b, _, _):
        b.serve("/meshmax/count/1.0.0", count, to="anyone")
        stream = await a.open_stream(b.peer_id, "/meshmax/count/1.0.0")
        await stream.send_all(bytes(100_000))
        await stream.send_eof()
        assert await stream.receive_some(100) == b"100000"


async def test_a_closed_connection_ends_at_the_other_side_at_once() -> None:
    async with joined() as (a, b, _, _):
        b.serve(ECHO, echo, to="anyone")
        stream = await a.open_stream(b.peer_id, ECHO)
        await b.disconnect(a.peer_id)
        with trio.fail_after(60), pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert b.peer_id not in a.connections()


async def test_a_peer_that_is_gone_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)  # 5 s in earnest, so that it takes half a minute
    async with joined() as (a, b, _, other):
        b.serve(ECHO, echo, to="anyone")
        stream = await a.open_stream(b.peer_id, ECHO)
        for protocol in other._channel._parts.connection._protocols:
            protocol.datagram_received = lambda _data, _addr: None  # type: ignore[assignment]
        with trio.fail_after(60), pytest.raises(PeerGone):
            await stream.receive_some(1)


async def test_whoever_proves_another_peer_id_is_refused_over_a_channel_too() -> None:
    async with (
        site() as channels,
        open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a,
        open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b,
        pair(channels) as (one, other),
        trio.open_nursery() as nursery,
    ):
        expected = SeededSigner(3).peer_id

        async def inward() -> None:
            with pytest.raises(ConnectError):
                await adopt(b, other, a, "in")

        nursery.start_soon(inward)
        with trio.fail_after(60), pytest.raises(ConnectError):
            await a.adopt(one, expected, "out", "punched-udp", "/ip4/192.0.2.1/udp/1")
        assert not a.connections()


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.03, 0.1])
async def test_an_adoption_that_is_cancelled_in_the_middle_leaves_nothing(after_s: float) -> None:
    async with (
        site() as channels,
        open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a,
        open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b,
        pair(channels) as (one, other),
    ):
        with trio.move_on_after(after_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(adopt, a, one, b, "out"))
                nursery.start_soon(partial(adopt, b, other, a, "in"))
        await a.disconnect(b.peer_id)
        await b.disconnect(a.peer_id)
