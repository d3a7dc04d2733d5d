"""What every Swarm does: the fake, the real one on a simulated cable in simulated time, the real one on loopback."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, ConnectError, MeshmaxError, PeerGone, RemoteProtocolError, VersionMismatch
from meshmax.base.ids import PeerId
from meshmax.net import limits
from meshmax.ports import PromisesProtocols, Stream, Swarm
from meshmax.testing.memory_swarm import SeededSigner
from tests.contracts.swarm_lan import Lan, LoopbackLan, MemoryLan, SimLan

ECHO = "/meshmax/echo/1.0.0"


@pytest.fixture(params=["memory", "sim", pytest.param("loopback", marks=pytest.mark.loopback)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock(kind: str) -> trio.testing.MockClock | None:
    return None if kind == "loopback" else trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def lan(kind: str) -> Lan:
    kinds: dict[str, Callable[[], Lan]] = {"memory": MemoryLan, "sim": SimLan, "loopback": LoopbackLan}
    return kinds[kind]()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


@asynccontextmanager
async def two(lan: Lan, protocol: str = ECHO, answer: Callable[[Stream], Awaitable[None]] = echo) -> AsyncIterator[Any]:
    async with lan.open(1) as a, lan.open(2) as b:
        b.serve(protocol, answer)
        with trio.fail_after(60):
            await a.dial(b.peer_id, b.addresses)
            yield a, b


async def read_all(stream: Stream) -> bytes:
    data = bytearray()
    while part := await stream.receive_some(65536):
        data += part
    return bytes(data)


async def settled(swarm: Swarm, *, connected: Sequence[PeerId]) -> None:
    while True:
        if set(swarm.connections()) == set(connected):
            return
        await trio.sleep(0.01)


async def test_a_stream_carries_bytes_both_ways_and_ends(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        assert stream.peer == b.peer_id
        await stream.send_all(b"hello")
        assert await stream.receive_some(100) == b"hello"
        await stream.send_all(b"bye")
        await stream.send_eof()
        assert await read_all(stream) == b"bye"
        assert await stream.receive_some(1) == b""
        await stream.aclose()
        await stream.aclose()
        await stream.reset()


async def test_both_sides_know_each_other_once_connected(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        await settled(b, connected=[a.peer_id])
        assert a.connections()[b.peer_id].direction == "out"
        assert b.connections()[a.peer_id].direction == "in"
        assert "/p2p/" not in a.connections()[b.peer_id].address
        await a.dial(b.peer_id, [])  # connected already: nothing to do


async def test_every_address_of_ours_ends_in_our_peer_id(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a:
        assert a.addresses
        assert all(address.endswith(f"/p2p/{a.peer_id}") for address in a.addresses)


async def test_the_answering_side_can_open_streams_too(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        a.serve("/meshmax/back/1.0.0", echo)
        await settled(b, connected=[a.peer_id])
        stream = await b.open_stream(a.peer_id, "/meshmax/back/1.0.0")
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        await stream.aclose()


async def test_an_answer_that_returns_closes_the_stream_after_its_last_byte(lan: Lan, clock: Any) -> None:
    async def answer(stream: Stream) -> None:
        await stream.send_all(b"z" * 200_000)

    async with two(lan, answer=answer) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        assert len(await read_all(stream)) == 200_000
        await stream.aclose()


async def test_an_answer_that_fails_resets_its_stream_and_nothing_else(lan: Lan, clock: Any) -> None:
    async def answer(stream: Stream) -> None:
        await stream.receive_some(1)
        raise RemoteProtocolError("no sense")

    async with two(lan, answer=answer) as (a, b):
        b.serve("/meshmax/other/1.0.0", echo)
        other = await a.open_stream(b.peer_id, "/meshmax/other/1.0.0")
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"?")
        with pytest.raises(PeerGone):
            await read_all(stream)
        await other.send_all(b"still here")
        assert await other.receive_some(100) == b"still here"
        await other.aclose()


async def test_a_reset_is_seen_by_the_other_side(lan: Lan, clock: Any) -> None:
    seen = trio.Event()

    async def answer(stream: Stream) -> None:
        try:
            await read_all(stream)
        except PeerGone:
            seen.set()

    async with two(lan, answer=answer) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"x")
        await stream.reset()
        await seen.wait()
        with pytest.raises(PeerGone):
            await stream.send_all(b"y")
        with pytest.raises(PeerGone):
            await stream.receive_some(1)


async def test_many_streams_run_side_by_side(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):

        async def one(number: int) -> None:
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(str(number).encode() * 100)
            await stream.send_eof()
            assert await read_all(stream) == str(number).encode() * 100
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)


async def test_megabytes_arrive_as_they_were_sent(lan: Lan, clock: Any) -> None:
    data = random.Random(7).randbytes(3_000_000)
    async with two(lan) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read_all(stream) == data
        await stream.aclose()


async def test_a_cancelled_send_costs_its_stream_never_the_connection(lan: Lan, clock: Any) -> None:
    async def answer(stream: Stream) -> None:
        await trio.sleep_forever()

    async with two(lan, answer=answer) as (a, b):
        b.serve("/meshmax/other/1.0.0", echo)
        for _ in range(5):
            stream = await a.open_stream(b.peer_id, ECHO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(5_000_000))
                await (
                    trio.testing.wait_all_tasks_blocked()
                )  # it has begun: one that has not may be cancelled at no cost
                nursery.cancel_scope.cancel()
            with pytest.raises(PeerGone):
                await stream.send_all(b"more")
        other = await a.open_stream(b.peer_id, "/meshmax/other/1.0.0")
        await other.send_all(b"alive")
        assert await other.receive_some(100) == b"alive"
        await other.aclose()


async def test_a_cancelled_receive_loses_no_byte(lan: Lan, clock: Any) -> None:
    data = random.Random(3).randbytes(400_000)

    async def answer(stream: Stream) -> None:
        for start in range(0, len(data), 10_000):
            await stream.send_all(data[start : start + 10_000])
            await trio.sleep(0.005)

    async with two(lan, answer=answer) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        received = bytearray()
        ended = False
        while not ended:
            with trio.move_on_after(0.0021):
                part = await stream.receive_some(3_000)
                received += part
                ended = not part
        assert bytes(received) == data
        await stream.aclose()


async def test_a_dial_wins_with_one_good_address_among_dead_ones(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        with trio.fail_after(2.0 * lan.patience):
            await a.dial(b.peer_id, [lan.dead, *b.addresses, lan.dead + "/p2p/" + b.peer_id])
        assert b.peer_id in a.connections()


async def test_a_later_address_is_not_tried_where_an_earlier_one_works_and_at_once_where_none_does(
    lan: Lan, clock: Any
) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        with trio.fail_after(5.0 * lan.patience):
            await a.dial(b.peer_id, [*b.addresses, lan.dead], delays_s=[*(0.0 for _ in b.addresses), 60.0])
            await a.disconnect(b.peer_id)
            await settled(a, connected=[])
            await settled(b, connected=[])
            with pytest.raises(ConnectError) as caught:
                await a.dial(b.peer_id, [lan.dead, lan.dead + "0"], delays_s=[0.0, 0.2])
        assert [attempt[0] for attempt in caught.value.attempts] == [lan.dead, lan.dead + "0"]


async def test_a_failing_dial_reports_every_attempt_and_a_later_one_is_tried_again(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        for _ in range(3):
            with pytest.raises(ConnectError) as caught:
                await a.dial(b.peer_id, [lan.dead])
            assert [attempt[0] for attempt in caught.value.attempts] == [lan.dead]
        with trio.fail_after(2.0 * lan.patience):
            await a.dial(b.peer_id, b.addresses)
        assert b.peer_id in a.connections()


async def test_a_dial_without_an_address_or_to_ourselves_is_refused(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a:
        with pytest.raises(ConnectError):
            await a.dial(SeededSigner(9).peer_id, [])
        with pytest.raises(ConnectError):
            await a.dial(a.peer_id, a.addresses)


async def test_a_peer_with_another_key_than_asked_for_is_refused(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        wanted = SeededSigner(3).peer_id
        plain = [address.partition("/p2p/")[0] for address in b.addresses]
        with pytest.raises(ConnectError):
            await a.dial(wanted, plain)
        with pytest.raises(ConnectError):
            await a.dial(wanted, b.addresses)
        assert not a.connections()
        await a.dial(b.peer_id, plain)


async def test_a_protocol_that_is_not_served_is_a_version_mismatch(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        with pytest.raises(VersionMismatch):
            await a.open_stream(b.peer_id, "/meshmax/echo/2.0.0")
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.aclose()


async def test_a_stream_needs_a_connection(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a:
        with pytest.raises(PeerGone):
            await a.open_stream(SeededSigner(9).peer_id, ECHO)


async def test_subscribers_hear_who_came_and_who_went(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        async with a.subscribe() as early:
            await a.dial(b.peer_id, b.addresses)
            event = await early.receive()
            assert (event.peer_id, event.kind) == (b.peer_id, "connected")
            async with a.subscribe() as late:
                event = await late.receive()
                assert (event.peer_id, event.kind) == (b.peer_id, "connected")
                await settled(b, connected=[a.peer_id])
                await b.disconnect(a.peer_id)
                for events in (early, late):
                    event = await events.receive()
                    assert (event.peer_id, event.kind) == (b.peer_id, "disconnected")
        assert not a.connections()
        await settled(b, connected=[])
        await a.dial(b.peer_id, b.addresses)  # and back again
        assert b.peer_id in a.connections()


async def test_disconnecting_frees_a_writer_that_nobody_reads_from(lan: Lan, clock: Any) -> None:
    async def answer(stream: Stream) -> None:
        await trio.sleep_forever()

    async with two(lan, answer=answer) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        freed = trio.Event()

        async def write() -> None:
            with pytest.raises(PeerGone):
                await stream.send_all(bytes(40_000_000))
            freed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(0.2)
            assert not freed.is_set()
            await a.disconnect(b.peer_id)
            assert b.peer_id not in a.connections()
            with trio.fail_after(1.0 * lan.patience):
                await freed.wait()
        await a.disconnect(b.peer_id)


async def test_streams_to_one_peer_are_bounded_and_closing_frees_them(lan: Lan, clock: Any) -> None:
    async def answer(stream: Stream) -> None:
        await stream.receive_some(1)

    async with two(lan, answer=answer) as (a, b):
        streams = [await a.open_stream(b.peer_id, ECHO) for _ in range(limits.MAX_STREAMS_PER_PEER)]
        with pytest.raises(Busy):
            await a.open_stream(b.peer_id, ECHO)
        for stream in streams:
            await stream.aclose()
        await trio.sleep(1.0)
        for _ in range(2 * limits.MAX_STREAMS_PER_PEER):
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.reset()
            await trio.sleep(0.002)


async def test_opening_streams_that_are_cancelled_costs_nothing(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        for _ in range(300):
            with trio.move_on_after(0.0001):
                stream = await a.open_stream(b.peer_id, ECHO)
                await stream.reset()
        await trio.sleep(0.5)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"alive")
        assert await stream.receive_some(10) == b"alive"
        await stream.aclose()


async def test_two_peers_that_dial_each_other_at_once_can_work(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        a.serve(ECHO, echo)
        b.serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.dial, b.peer_id, b.addresses)
            nursery.start_soon(b.dial, a.peer_id, a.addresses)
        for source, target in ((a, b), (b, a)):
            stream = await source.open_stream(target.peer_id, ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
            await stream.aclose()


async def test_garbage_at_the_port_hurts_nobody(lan: Lan, clock: Any) -> None:
    garbage = random.Random(5).randbytes(70_000)
    async with two(lan) as (a, b):
        for data in (garbage, b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n" + garbage, b"\xff" * 12):
            await lan.send_garbage(b.addresses[0], data)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"alive")
        assert await stream.receive_some(10) == b"alive"
        await stream.aclose()


async def test_nothing_is_left_running_after_a_swarm_is_closed(lan: Lan, clock: Any) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with two(lan) as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"x")
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_the_other_side_sees_at_once_that_a_swarm_closed(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, a.subscribe() as events:
        async with lan.open(2) as b:
            b.serve(ECHO, echo)
            await a.dial(b.peer_id, b.addresses)
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
        with trio.fail_after(1.0 * lan.patience):
            with pytest.raises(PeerGone):
                await stream.receive_some(1)
            assert [(await events.receive()).kind for _ in range(2)] == ["connected", "disconnected"]


# --- protocols that are served a moment after the peer listens -------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
async def test_a_stream_of_a_promised_protocol_waits_until_it_is_served(lan: Lan, clock: Any, eager: bool) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        assert isinstance(b, PromisesProtocols)
        b.promise([ECHO])
        with trio.fail_after(60):
            await a.dial(b.peer_id, b.addresses)
            said: list[bytes] = []

            async def ask() -> None:
                stream = await a.open_stream(b.peer_id, ECHO, eager=eager)
                await stream.send_all(b"early")
                said.append(await stream.receive_some(100))
                await stream.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await trio.sleep(0.5)
                assert not said
                b.serve(ECHO, echo)
            assert said == [b"early"]
            b.promise([ECHO])  # it is served already
            assert b.promised_all() == ()
            await ask()


@pytest.mark.parametrize("eager", [False, True])
async def test_a_promise_that_is_not_kept_refuses_who_waited_and_who_comes_later(
    lan: Lan, clock: Any, eager: bool
) -> None:
    async with lan.open(1) as a, lan.open(2) as b:
        assert isinstance(b, PromisesProtocols)
        b.promise([ECHO])
        refused: list[MeshmaxError] = []

        async def ask() -> None:
            try:
                stream = await a.open_stream(b.peer_id, ECHO, eager=eager)
                await stream.send_all(b"early")
                assert await stream.receive_some(100) == b""
                await stream.aclose()
            except (PeerGone, VersionMismatch) as error:
                refused.append(error)

        with trio.fail_after(60):
            await a.dial(b.peer_id, b.addresses)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await trio.sleep(0.5)
                assert b.promised_all() == (ECHO,)
            await ask()
        assert len(refused) == 2
        assert isinstance(refused[1], VersionMismatch)
        b.serve(ECHO, echo)  # late, and served all the same
        with trio.fail_after(60):
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
            await stream.aclose()
