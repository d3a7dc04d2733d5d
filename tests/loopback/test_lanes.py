"""Blob lanes on real sockets and threads: what comes through, and how lanes end."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    ChunkMismatch,
    ConnectError,
    LocalProtocolError,
    NotOffered,
    PeerGone,
    StoreFull,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.units import MIB
from meshmax.net import lane as net_lane
from meshmax.net import lanes as net_lanes
from meshmax.net.lane import PIECE_BYTES
from meshmax.net.lanes import FETCH_LANES, MAX_LANES, MAX_LANES_PER_PEER
from meshmax.ports import (
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneEvent,
    LaneLacking,
    LaneStoreFailed,
)
from meshmax.testing.garbage import collector_off
from meshmax.wire import lane_frames
from meshmax.wire.lane import CHACHA20_POLY1305, MAX_WANTS, LaneAsk
from tests.loopback.lane_site import DIGEST, FETCHER, OTHER, PROMPTLY_S, SERVER, chunk_of, quietly, read, site

pytestmark = pytest.mark.loopback


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


async def test_a_chunk_moves_in_pieces_as_the_pace_of_each_end_has_it() -> None:
    sent: list[int] = []
    received: list[int] = []

    def piece(pieces: list[int], most: int, size: int) -> int:
        pieces.append(min(size, most))
        return pieces[-1]

    async with site() as here:
        lane, served = await here.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read, partial(piece, sent, 50_000)))
            nursery.start_soon(quietly, partial(lane.run, here.sink, here.tell, partial(piece, received, 30_000)))
            lane.want(DIGEST, [1, 4, 2])
            await here.hear(3)
            lane.close()
    assert here.sunk == {index: chunk_of(index) for index in (1, 4, 2)}
    assert sum(sent) == sum(received) == 2 * MIB + 1000
    assert len(sent) == 2 * -(-MIB // 50_000) + 1
    assert len(received) == 2 * -(-MIB // 30_000) + 1


async def test_a_chunk_that_comes_slowly_is_seen_to_come() -> None:
    seen: list[int] = []

    def slowly(size: int) -> int:
        time.sleep(0.08)
        return min(size, 100_000)

    def pace(size: int) -> int:
        seen.append(size)
        return size

    async with site() as here:
        lane, served = await here.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, read, slowly))
            nursery.start_soon(quietly, partial(lane.run, here.sink, here.tell, pace))
            lane.want(DIGEST, [1, 2])
            await here.hear(2)
            lane.close()
    assert seen == [PIECE_BYTES] * 8


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
        with trio.fail_after(60):
            async with here.running() as (lane, _):
                lane.want(DIGEST, [1, 2, 3])
    assert [event.index for event in here.events] == [1, 2]


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
                while len(ended) < 2:  # noqa: ASYNC110  it looks from outside
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
                while here.server.count:  # noqa: ASYNC110  it looks from outside
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


async def test_those_who_fetch_from_us_leave_us_lanes_to_fetch_by() -> None:
    async with site() as here:
        here.server._places |= {
            net_lanes._Place(PeerId(f"p{number}"), "serve") for number in range(MAX_LANES - FETCH_LANES)
        }
        with pytest.raises(Busy), here.server.expect(FETCHER, here.fetcher.ask()):
            pass
        for number in range(FETCH_LANES):
            here.server._take_place(PeerId(f"q{number}"), "fetch")
        with pytest.raises(Busy):
            here.server._take_place(OTHER, "fetch")
        here.server._places.clear()


async def test_a_lane_of_which_nothing_is_wanted_ends_in_order_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_lane, "IDLE_S", 0.3)
    async with site() as here:
        lane, served = await here.pair()
        lane.want(DIGEST, [1])
        with trio.fail_after(10 * PROMPTLY_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.run, read)
                nursery.start_soon(lane.run, here.sink, here.tell)  # neither raises
        assert here.events == [LaneArrived(DIGEST, 1, MIB)]
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


@pytest.mark.parametrize("cuts", ["fetcher", "server"])
async def test_a_lane_that_was_cut_in_the_middle_leaves_no_buffer_at_either_end(cuts: str) -> None:
    with collector_off() as left:
        for _ in range(3):
            async with site() as here:
                lane, served = await here.pair()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(quietly, partial(served.run, read))
                    nursery.start_soon(quietly, partial(lane.run, lambda *_: None, here.tell))
                    lane.want(DIGEST, list(range(40)))
                    await here.hear(2)
                    (lane if cuts == "fetcher" else served).close()
            del here, lane, served, nursery
    assert not left.buffers
    assert not left.rings
