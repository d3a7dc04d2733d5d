"""Blob lanes on real sockets and threads: what comes through, who does not, and how lanes end."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    ChunkMismatch,
    ConnectError,
    LocalProtocolError,
    MeshmaxError,
    NotOffered,
    PeerGone,
    RemoteProtocolError,
    StoreFull,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.units import MIB
from meshmax.net import lanes as net_lanes
from meshmax.net.lane import TcpFetchLane, TcpServeLane
from meshmax.net.lane_socket import STALL_S
from meshmax.net.lanes import MAX_LANES_PER_PEER, TcpLanes, open_lanes
from meshmax.ports import (
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneEvent,
    LaneLacking,
    LaneStoreFailed,
)
from meshmax.wire import lane_frames
from meshmax.wire.lane import CHACHA20_POLY1305, MAX_WANTS, LaneAsk, LaneGrant
from meshmax.wire.lane_frames import HELLO_BYTES

pytestmark = pytest.mark.loopback
FETCHER, SERVER, OTHER = PeerId("fetcher"), PeerId("server"), PeerId("other")
DIGEST = Sha256("ab" * 32)
PROMPTLY_S = 2.0  # for what takes milliseconds on an idle machine


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    began_s = time.monotonic()
    yield
    assert time.monotonic() - began_s < 60


def chunk_of(index: int) -> bytes:
    return bytes([index % 251]) * (MIB if index % 4 else 1000)


def read(digest: Sha256, index: int, buffer: memoryview) -> int:
    data = chunk_of(index)
    buffer[: len(data)] = data
    return len(data)


class Site:
    """A server and a fetcher, and what came over their lanes."""

    def __init__(self, server: TcpLanes, fetcher: TcpLanes) -> None:
        self.server, self.fetcher = server, fetcher
        self.sunk: dict[int, bytes] = {}
        self.events: list[LaneEvent] = []
        self.heard = trio.Event()

    def sink(self, digest: Sha256, index: int, data: memoryview) -> None:
        self.sunk[index] = bytes(data)

    def tell(self, event: LaneEvent) -> None:
        self.events.append(event)
        self.heard.set()

    async def hear(self, count: int) -> None:
        with trio.fail_after(20):
            while len(self.events) < count:
                self.heard = trio.Event()
                await self.heard.wait()

    async def pair(self, port: int | None = None) -> tuple[TcpFetchLane, TcpServeLane]:
        ask = self.fetcher.ask()
        with self.server.expect(FETCHER, ask) as expected:
            grant = expected.grant
            if port is not None:
                grant = LaneGrant(grant.lane_id, grant.secret, grant.cipher, port)
            with trio.fail_after(20):
                lane = await self.fetcher.connect(SERVER, "127.0.0.1", ask, grant)
                return lane, await expected.arrive()

    @asynccontextmanager
    async def running(
        self, port: int | None = None, reads: Callable[[Sha256, int, memoryview], int] = read
    ) -> AsyncIterator[tuple[TcpFetchLane, TcpServeLane]]:
        lane, served = await self.pair(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, reads))
            nursery.start_soon(lane.run, self.sink, self.tell)
            yield lane, served


async def quietly(run: Callable[[], Awaitable[None]]) -> None:
    with suppress(PeerGone):
        await run()


@asynccontextmanager
async def site(stall_s: float = STALL_S) -> AsyncIterator[Site]:
    async with open_lanes(SERVER, [("127.0.0.1", 0)], lambda ip: True, stall_s) as server:
        async with open_lanes(FETCHER, [], lambda ip: True, stall_s) as fetcher:
            here = Site(server, fetcher)
            yield here
            with trio.fail_after(20):
                while server.count or fetcher.count:  # nothing of a lane is left when its test has ended
                    await trio.sleep(0.01)


# --- what comes through ---------------------------------------------------------------------------------------------


async def test_chunks_come_whole_and_in_the_order_of_asking() -> None:
    async with site() as here, here.running() as (lane, _):
        lane.want(DIGEST, [5, 4])
        lane.want(DIGEST, list(range(100, 106)))
        await here.hear(8)
        lane.close()
    order = [5, 4, *range(100, 106)]
    assert here.events == [LaneArrived(DIGEST, index, len(chunk_of(index))) for index in order]
    assert here.sunk == {index: chunk_of(index) for index in order}


async def test_a_lane_works_with_chacha20_where_one_end_likes_it_better() -> None:
    async with site() as here:
        here.fetcher._ciphers = (CHACHA20_POLY1305,)
        async with here.running() as (lane, _):
            lane.want(DIGEST, [1])
            await here.hear(1)
            lane.close()
    assert here.sunk == {1: chunk_of(1)}


async def test_each_want_gets_one_last_word_whatever_becomes_of_it() -> None:
    def reads(digest: Sha256, index: int, buffer: memoryview) -> int:
        if index == 0:
            raise BlobNotFound
        if index == 1:
            raise Busy("not now", 2.5)
        return read(digest, index, buffer)

    def sink(digest: Sha256, index: int, data: memoryview) -> None:
        if index == 2:
            raise ChunkMismatch
        if index == 3:
            raise full

    full = StoreFull()
    async with site() as here:
        here.sink = sink  # type: ignore[method-assign]
        async with here.running(reads=reads) as (lane, _):
            lane.want(DIGEST, range(5))
            await here.hear(5)
            lane.close()
    assert here.events == [
        LaneLacking(DIGEST, 0),
        LaneBusy(DIGEST, 1, 2.5),
        LaneBad(DIGEST, 2, MIB),
        LaneStoreFailed(DIGEST, 3, full),
        LaneArrived(DIGEST, 4, 1000),
    ]


async def test_a_cancelled_chunk_that_was_not_sent_does_not_come() -> None:
    reading, go = threading.Event(), threading.Event()

    def reads(digest: Sha256, index: int, buffer: memoryview) -> int:
        reading.set()
        go.wait(20)
        return read(digest, index, buffer)

    async with site() as here, here.running(reads=reads) as (lane, _):
        lane.want(DIGEST, [1, 2, 3])
        await trio.to_thread.run_sync(reading.wait, 20)
        lane.cancel(DIGEST, 1)  # too late
        lane.cancel(DIGEST, 2)
        lane.cancel(DIGEST, 9)  # never wanted
        go.set()
        await here.hear(3)
        lane.close()
    assert here.events == [LaneArrived(DIGEST, 1, MIB), LaneCancelled(DIGEST, 2), LaneArrived(DIGEST, 3, MIB)]


async def test_what_had_come_before_a_cancellation_is_told_all_the_same() -> None:
    def tell(event: LaneEvent) -> None:
        here.tell(event)
        scope.cancel()

    async with site() as here:
        lane, served = await here.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read))
            lane.want(DIGEST, range(1, 5))
            with trio.CancelScope() as scope:
                await lane.run(here.sink, tell)
    assert {event.index for event in here.events} == set(here.sunk) != set()


async def test_wants_beyond_the_bound_or_twice_at_once_are_our_mistake() -> None:
    async with site() as here:
        lane, served = await here.pair()
        for start in range(0, MAX_WANTS, 2):
            lane.want(DIGEST, [start, start + 1])  # nobody reads them yet, and none of this blocks
        with pytest.raises(LocalProtocolError, match="at most"):
            lane.want(DIGEST, [MAX_WANTS])
        lane.cancel(DIGEST, 0)
        lane.close()
        with pytest.raises(PeerGone):
            lane.want(Sha256("cd" * 32), [0])
        served.close()
        again, served = await here.pair()
        again.want(DIGEST, [1])
        for twice in ([1], [2, 2]):
            with pytest.raises(LocalProtocolError, match="once at a time"):
                again.want(DIGEST, twice)
        again.close()
        served.close()


async def test_a_lane_whose_frame_numbers_are_used_up_ends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_frames, "MAX_FRAMES", 4)  # a Welcome, two chunks, an End
    async with site() as here:
        with trio.fail_after(20):
            async with here.running() as (lane, _):
                lane.want(DIGEST, [1, 2, 3])
    assert [event.index for event in here.events] == [1, 2]


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
            with pytest.raises(error), trio.fail_after(20):
                await lane.run(here.sink, here.tell)
    expected = {1: chunk_of(1)} | ({2: chunk_of(2)} if change is replayed else {})
    assert here.sunk == expected


async def test_a_want_that_was_changed_on_the_path_ends_the_lane_at_the_server() -> None:
    async with site() as here:
        lane, served = await here.pair()
        lane._socket.send_now(memoryview(bytes(100)))
        with pytest.raises(RemoteProtocolError), trio.fail_after(20):
            await served.run(read)
        lane.close()


async def test_a_chunk_that_nobody_asked_for_ends_the_lane() -> None:
    async with site() as here:
        lane, served = await here.pair()
        served._queue[DIGEST, 9] = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read))
            lane.want(DIGEST, [1])
            with pytest.raises(RemoteProtocolError, match="not asked for"), trio.fail_after(20):
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
            with pytest.raises(PeerGone, match="stopped inside a frame"), trio.fail_after(20):
                await lane.run(here.sink, here.tell)
    assert here.sunk == {}


async def test_a_peer_that_stops_reading_is_noticed() -> None:
    async with site(stall_s=0.3) as here:
        lane, served = await here.pair()
        lane.want(DIGEST, [index for index in range(1, 200) if index % 4])  # more than the buffers of both kernels take
        with pytest.raises(PeerGone, match="did not read"), trio.fail_after(20):
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
    with trio.fail_after(20):
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
            with pytest.raises(ConnectError, match="lane's key"), trio.fail_after(20):
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
            with trio.fail_after(20):
                while came < crowd_size:
                    await trio.sleep(0.01)
            async with here.running() as (lane, _):
                lane.want(DIGEST, [1])
                await here.hear(1)
                lane.close()
            here.events.clear()
        assert threading.active_count() <= threads + 4  # two lane threads, and the resolver's
        nursery.cancel_scope.cancel()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kib < 60 * 1024


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_closing_a_peer_ends_its_lanes_both_ways_and_no_others() -> None:
    async with site() as here:
        lane, served = await here.pair()
        ended: list[str] = []

        async def run(name: str, work: Callable[[], Awaitable[None]]) -> None:
            await quietly(work)
            ended.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "served", partial(served.run, read))
            nursery.start_soon(run, "fetching", partial(lane.run, here.sink, here.tell))
            await trio.sleep(0.05)
            here.server.close_peer(OTHER)
            await trio.sleep(0.05)
            assert ended == []
            with trio.fail_after(PROMPTLY_S):
                here.server.close_peer(FETCHER)
                while len(ended) < 2:
                    await trio.sleep(0.005)


async def test_closing_a_peer_takes_back_what_was_expected_of_it() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected:
            here.server.close_peer(FETCHER)
            with pytest.raises(PeerGone), trio.fail_after(PROMPTLY_S):
                await expected.arrive()
            with pytest.raises(ConnectError):
                await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)


@pytest.mark.parametrize("busy", [False, True])
async def test_a_cancelled_run_ends_its_thread_at_once(busy: bool) -> None:
    async with site() as here:
        lane, served = await here.pair()
        async with trio.open_nursery() as outer:
            outer.start_soon(quietly, partial(served.run, read))
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lane.run, here.sink, here.tell)
                    if busy:
                        lane.want(DIGEST, range(1, 200))
                    await trio.sleep(0.05)
                    began_s = time.monotonic()
                    scope.cancel()
            assert time.monotonic() - began_s < PROMPTLY_S
            assert here.fetcher.count == 0
            sunk = len(here.sunk)
            await trio.sleep(0.05)
            assert len(here.sunk) == sunk  # nothing is written after `run` has returned


async def test_a_cancelled_server_ends_its_thread_at_once_though_nobody_reads() -> None:
    async with site() as here:
        lane, served = await here.pair()
        lane.want(DIGEST, range(1, 200))
        with trio.move_on_after(0.3) as scope:
            await served.run(read)
        assert scope.cancelled_caught
        assert trio.current_time() - scope.deadline < PROMPTLY_S
        assert here.server.count == 0
        lane.close()


async def test_a_thread_that_waits_for_a_limit_is_woken_by_the_end_of_its_lane() -> None:
    async with site() as here:
        lane, served = await here.pair()

        def reads(digest: Sha256, index: int, buffer: memoryview) -> int:
            served.pause(1000)
            raise AssertionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(lane.run, here.sink, here.tell))
            nursery.start_soon(served.run, reads)
            lane.want(DIGEST, [1])
            await trio.sleep(0.1)
            with trio.fail_after(PROMPTLY_S):
                served.close()
                while here.server.count:
                    await trio.sleep(0.005)
            lane.close()


async def test_a_lane_runs_once_and_not_at_all_when_it_is_closed_before() -> None:
    async with site() as here:
        lane, served = await here.pair()
        lane.close()
        await lane.run(here.sink, here.tell)
        served.close()
        await served.run(read)


async def test_lanes_are_bounded_by_peer_and_counted_until_they_have_ended() -> None:
    async with site() as here:
        pairs = [await here.pair() for _ in range(MAX_LANES_PER_PEER)]
        with pytest.raises(Busy, match="no more lanes"):
            await here.pair()
        with here.server.expect(OTHER, here.fetcher.ask()):
            assert here.server.count == MAX_LANES_PER_PEER + 1
        assert here.server.count == MAX_LANES_PER_PEER
        for lane, served in pairs:
            lane.close()
            served.close()
        assert here.server.count == here.fetcher.count == 0


async def test_a_fetcher_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_lanes, "LANE_WAIT_S", 0.1)
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected:
            with pytest.raises(PeerGone, match="did not come"), trio.fail_after(PROMPTLY_S):
                await expected.arrive()
            with pytest.raises(ConnectError):  # too late
                await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)


async def test_a_server_that_stops_waiting_closes_a_lane_that_came_meanwhile() -> None:
    async with site() as here:
        ask = here.fetcher.ask()
        with here.server.expect(FETCHER, ask) as expected:
            lane = await here.fetcher.connect(SERVER, "127.0.0.1", ask, expected.grant)
        assert here.server.count == 0
        with pytest.raises(PeerGone), trio.fail_after(PROMPTLY_S):
            await lane.run(here.sink, here.tell)


async def test_a_peer_without_a_lane_port_offers_no_lanes() -> None:
    async with site() as here:
        assert here.fetcher.port == 0
        with pytest.raises(NotOffered):
            with here.fetcher.expect(SERVER, LaneAsk(b"s" * 32, (CHACHA20_POLY1305,))):
                pass


async def test_a_port_where_nobody_listens_is_a_connect_error() -> None:
    async with site() as here:
        with pytest.raises(ConnectError, match="port 1:"):
            await here.pair(1)
