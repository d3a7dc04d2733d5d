"""Blob lanes on real sockets and threads: tampering on the path, stalls, impostors and strangers by the thousand."""

from __future__ import annotations

import resource
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
import trio

from meshmax.base.errors import (
    ConnectError,
    LocalProtocolError,
    MeshmaxError,
    PeerGone,
    RemoteProtocolError,
)
from meshmax.wire.lane_frames import HELLO_BYTES
from tests.loopback.lane_site import DIGEST, FETCHER, OTHER, SERVER, Site, chunk_of, quietly, read, site

pytestmark = pytest.mark.loopback


# --- the path between -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def attacker(port: int, change: Callable[[int, bytes], list[bytes] | None]) -> AsyncIterator[int]:
    """A relay to ``port``: frame n of the server becomes ``change(n, frame)``; None: nothing more is sent."""

    async def frames(server: trio.SocketStream, client: trio.SocketStream) -> None:
        data, number = b"", 0
        async for more in server:
            data += more
            while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
                size = 4 + int.from_bytes(data[:4], "big")
                frame, data = data[:size], data[size:]
                changed = change(number, frame)
                number += 1
                if changed is None:
                    return
                for one in changed:
                    await client.send_all(one)

    async def relay(client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as server, client:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(forward, client, server)
                    await frames(server, client)
                    nursery.cancel_scope.cancel()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def forward(client: trio.SocketStream, server: trio.SocketStream) -> None:
        async for data in client:
            await server.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(partial(trio.serve_tcp, relay, 0, host="127.0.0.1"))
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def flipped(number: int, frame: bytes) -> list[bytes]:
    return [frame[:-100] + bytes([frame[-100] ^ 1]) + frame[-99:]] if number == 2 else [frame]


def replayed(number: int, frame: bytes) -> list[bytes]:
    return [frame, frame] if number == 2 else [frame]


def dropped(number: int, frame: bytes) -> list[bytes]:
    return [] if number == 2 else [frame]


def reordered() -> Callable[[int, bytes], list[bytes]]:
    held: list[bytes] = []

    def change(number: int, frame: bytes) -> list[bytes]:
        if number == 2:
            held.append(frame)
            return []
        return [frame, *held] if number == 3 else [frame]

    return change


def cut_inside(number: int, frame: bytes) -> list[bytes] | None:
    return [frame] if number < 2 else [frame[:5000]] if number == 2 else None


def cut_between(number: int, frame: bytes) -> list[bytes] | None:
    return [frame] if number < 2 else None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (flipped, RemoteProtocolError),
        (replayed, RemoteProtocolError),
        (dropped, RemoteProtocolError),
        (reordered(), RemoteProtocolError),
        (cut_inside, PeerGone),
        (cut_between, PeerGone),
    ],
    ids=["flipped bit", "replayed", "dropped", "reordered", "cut inside a frame", "cut between frames"],
)
async def test_whatever_is_done_on_the_path_ends_the_lane_and_lands_nothing(
    change: Callable[[int, bytes], list[bytes] | None], error: type[MeshmaxError]
) -> None:
    async with site() as here, attacker(here.server.port, change) as port:
        lane, served = await here.pair(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read))
            lane.want(DIGEST, [1, 2, 3, 5])
            with pytest.raises(error), trio.fail_after(60):
                await lane.run(here.sink, here.tell)
    expected = {1: chunk_of(1)} | ({2: chunk_of(2)} if change is replayed else {})
    assert here.sunk == expected


async def test_a_want_that_was_changed_on_the_path_ends_the_lane_at_the_server() -> None:
    async with site() as here:
        lane, served = await here.pair()
        lane._socket.send_now(memoryview(bytes(100)))
        with pytest.raises(RemoteProtocolError), trio.fail_after(60):
            await served.run(read)
        lane.close()


async def test_a_chunk_that_nobody_asked_for_ends_the_lane() -> None:
    async with site() as here:
        lane, served = await here.pair()
        served._queue[DIGEST, 9] = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read))
            lane.want(DIGEST, [1])
            with pytest.raises(RemoteProtocolError, match="not asked for"), trio.fail_after(60):
                await lane.run(here.sink, here.tell)
    assert 9 not in here.sunk


async def test_a_sender_that_stalls_inside_a_frame_is_noticed() -> None:
    def change(number: int, frame: bytes) -> list[bytes]:
        return [frame] if number < 1 else [frame[:5000]] if number == 1 else []

    async with site(stall_s=0.3) as here, attacker(here.server.port, change) as port:
        lane, served = await here.pair(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read))
            lane.want(DIGEST, [1])
            with pytest.raises(PeerGone, match="stopped inside a frame"), trio.fail_after(60):
                await lane.run(here.sink, here.tell)
    assert here.sunk == {}


async def test_a_peer_that_stops_reading_is_noticed() -> None:
    async with site(stall_s=0.3) as here:
        lane, served = await here.pair()
        lane.want(DIGEST, [index for index in range(1, 200) if index % 4])  # more than the buffers of both kernels take
        with pytest.raises(PeerGone, match="did not read"), trio.fail_after(60):
            await served.run(read)
        lane.close()


async def test_a_lane_may_be_idle_for_longer_than_a_frame_may_stall() -> None:
    async with site(stall_s=0.1) as here, here.running() as (lane, _):
        await trio.sleep(0.5)
        lane.want(DIGEST, [1])
        await here.hear(1)
        lane.close()
    assert here.sunk == {1: chunk_of(1)}


# --- strangers and impostors ----------------------------------------------------------------------------------------


async def refused(port: int, data: bytes) -> None:
    """Whoever says ``data`` gets no byte back, and an end."""
    with trio.fail_after(60):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            try:
                await stream.send_all(data)
                assert await stream.receive_some(1) == b""
            except trio.BrokenResourceError:
                pass


async def test_a_lane_id_works_once() -> None:
    said: list[bytes] = []

    async def listen(here: Site) -> int:
        """Where a fetcher's hello is overheard, and passed on."""

        async def overhear(client: trio.SocketStream) -> None:
            data = b""
            while len(data) < HELLO_BYTES:
                data += await client.receive_some(HELLO_BYTES - len(data))
            said.append(data)
            async with await trio.open_tcp_stream("127.0.0.1", here.server.port) as server:
                await server.send_all(data)
                await client.send_all(await server.receive_some(1000))
                await trio.sleep_forever()

        found: list[Any] = await nursery.start(partial(trio.serve_tcp, overhear, 0, host="127.0.0.1"))
        return int(found[0].socket.getsockname()[1])

    async with site() as here, trio.open_nursery() as nursery:
        lane, served = await here.pair(await listen(here))
        await refused(here.server.port, said[0])
        assert here.server.count == 1
        lane.close()
        served.close()
        nursery.cancel_scope.cancel()


async def test_an_ask_of_ours_opens_one_lane_only() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected:
            lane = await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)
            with pytest.raises(LocalProtocolError, match="once"):
                await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)
            lane.close()


async def test_a_wrong_proof_is_refused_and_takes_nobodys_place() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected:
            await refused(here.server.port, expected.grant.lane_id + bytes(HELLO_BYTES - 16))
            await refused(here.server.port, expected.grant.lane_id + (64).to_bytes(4, "big") + bytes(64))
            await refused(here.server.port, bytes(HELLO_BYTES))
            lane = await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)
            (await expected.arrive()).close()
            lane.close()


async def test_another_peer_with_the_same_words_has_other_keys() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(OTHER, ask) as expected:
            with pytest.raises(ConnectError, match="lane's key"), trio.fail_after(60):
                await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)


async def test_an_impostor_at_the_lane_port_is_found_out() -> None:
    async def impostor(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all((64).to_bytes(4, "big") + bytes(64))

    async with site() as here, trio.open_nursery() as nursery:
        found: list[Any] = await nursery.start(partial(trio.serve_tcp, impostor, 0, host="127.0.0.1"))
        with pytest.raises(ConnectError, match="lane's key"):
            await here.pair(int(found[0].socket.getsockname()[1]))
        nursery.cancel_scope.cancel()


async def test_thousands_of_strangers_cost_no_thread_and_little_memory_and_honest_lanes_still_open() -> None:
    came = 0

    async def stranger(number: int) -> None:
        nonlocal came
        came += 1
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", here.server.port)
        except OSError:
            return
        async with stream:
            try:
                if number % 3 == 0:
                    await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
                elif number % 3 == 1:
                    await stream.send_all(bytes(HELLO_BYTES - 1))
                await stream.receive_some(1)
            except trio.BrokenResourceError:
                pass

    async def crowd() -> None:
        for number in count():
            with trio.move_on_after(2):
                await stranger(number)

    workers = 300  # at once: more than the port lets in unproved
    async with site() as here, trio.open_nursery() as nursery:
        for end in await here.pair():
            end.close()  # whatever the first one imports and allocates is there
        threads, memory_kib = threading.active_count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(workers):
            nursery.start_soon(crowd)
        for crowd_size in (500, 1000, 2000):
            with trio.fail_after(60):
                while came < crowd_size:  # noqa: ASYNC110  it looks from outside
                    await trio.sleep(0.01)
            async with here.running() as (lane, _):
                lane.want(DIGEST, [1])
                await here.hear(1)
                lane.close()
            here.events.clear()
        assert threading.active_count() <= threads + 4  # two lane threads, and the resolver's
        nursery.cancel_scope.cancel()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kib < 60 * 1024
