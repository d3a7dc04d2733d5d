"""Better paths between peers of the in-memory network, by ports and channels that meet as the test says; in virtual time."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, ConnectError, PeerGone
from meshmax.base.model import Signed
from meshmax.base.reachability import Reachability
from meshmax.base.traversal import Candidate, TurnServer
from meshmax.core.attempt import ATTEMPT_S, MAX_HEARD
from meshmax.net.interfaces import Interface
from meshmax.ports import ByteStream, Stream
from meshmax.services.attempt import AttemptRun
from meshmax.services.frames import FrameStream
from meshmax.services.signalling import Signalling
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.testing.memory_traversal import MemoryNats, MemoryPunchPort
from meshmax.wire import signal as wire
from meshmax.wire.protocols import SIGNAL

RELAYED = "/ip4/198.51.100.9/tcp/1/p2p/R/p2p-circuit"
IPS = ("198.51.100.1", "198.51.100.2")


class Standing:
    view = Reachability()
    udp_blocked = False
    stun: tuple[tuple[str, int], ...] = (("198.51.100.9", 3478),)
    tcp_observers: tuple[tuple[str, int], ...] = (("198.51.100.9", 443),)
    vouchers: tuple[Signed, ...] = ()


class Side:
    def __init__(self, swarm: MemorySwarm, nats: MemoryNats, ip: str, turn: tuple[TurnServer, ...]) -> None:
        self.swarm, self.standing, self.paths = swarm, Standing(), nats.side(ip)
        self.lanes: list[ByteStream] = []
        self.allowed = True
        self.addresses: tuple[str, ...] = ()
        self.signalling = Signalling(
            swarm,
            self.paths,
            self.paths,
            self.standing,
            vouched=lambda peer_id, vouchers: frozenset(IPS),
            interfaces=lambda: [Interface("eth0", 1, self.addresses)],
            turn=turn,
            allowed=lambda: self.allowed,
        )
        self.signalling.on_lane_stream = self.take

    async def take(self, stream: ByteStream) -> None:
        self.lanes.append(stream)

    @property
    def path(self) -> list[str]:
        return [view.path for view in self.swarm.connections().values()]


@asynccontextmanager
async def two(nats: MemoryNats, turn: tuple[TurnServer, ...] = ()) -> AsyncIterator[tuple[Side, Side]]:
    """Connected over a relay, the first of them with the smaller PeerId."""
    network = MemoryNetwork(latency_s=0.02)
    async with network.open_swarm(SeededSigner(1)) as one, network.open_swarm(SeededSigner(2)) as other:
        a, b = sorted((one, other), key=lambda swarm: swarm.peer_id)
        ours, theirs = nats.pair(("198.51.100.9", 1), ("198.51.100.9", 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(b.adopt, theirs, a.peer_id, "in", "relay", RELAYED))
            await a.adopt(ours, b.peer_id, "out", "relay", RELAYED)
        sides = Side(a, nats, IPS[0], turn), Side(b, nats, IPS[1], turn)
        yield sides
        await trio.sleep(1.0)  # the last word arrives
        assert nats.open == 0
        assert not nats.running


async def eventually(what: Callable[[], bool]) -> None:
    for _ in range(3000):
        if what():
            return
        await trio.sleep(0.01)
    raise AssertionError("it did not come true within 30 s")


@pytest.mark.parametrize("leader", [0, 1])
async def test_two_relayed_peers_get_a_path_by_tcp_in_a_few_round_trips(
    leader: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with two(MemoryNats()) as sides:
        started = trio.current_time()
        assert await sides[leader].signalling.traverse(sides[1 - leader].swarm.peer_id) == "punched-tcp"
        assert trio.current_time() - started < 0.6
        await eventually(lambda: sides[0].path == sides[1].path == ["punched-tcp"])
        assert sides[0].paths.observers == [("198.51.100.9", 443)]


async def test_where_tcp_does_not_get_through_udp_does(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats(tcp=False)) as (a, b):
        started = trio.current_time()
        assert await a.signalling.traverse(b.swarm.peer_id) == "punched-udp"
        assert trio.current_time() - started < 1.3  # TCP has a head start
        await eventually(lambda: a.path == b.path == ["punched-udp"])
        assert next(iter(a.swarm.connections().values())).address.startswith(f"/ip4/{IPS[1]}/udp/4")


async def test_where_nothing_gets_through_every_method_is_told_and_the_relay_stays(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two(MemoryNats(tcp=False, udp=False)) as (a, b):
        started = trio.current_time()
        with pytest.raises(ConnectError) as caught:
            await a.signalling.traverse(b.swarm.peer_id)
        assert {attempt[0] for attempt in caught.value.attempts} >= {"punch-tcp", "punch-udp"}
        assert trio.current_time() - started < 6.0
        assert a.path == b.path == ["relay"]


async def test_where_udp_is_blocked_nobody_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats(tcp=False)) as (a, b):
        b.standing.udp_blocked = True
        started = trio.current_time()
        with pytest.raises(ConnectError, match="the peer has no way over UDP"):
            await a.signalling.traverse(b.swarm.peer_id)
        assert trio.current_time() - started < 3.0
        with pytest.raises(ConnectError, match="UDP does not get out of this network"):
            await b.signalling.traverse(a.swarm.peer_id)


async def test_both_that_want_a_path_at_once_get_the_same_one(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats()) as (a, b):
        paths = []

        async def want(side: Side, other: Side) -> None:
            paths.append(await side.signalling.traverse(other.swarm.peer_id))

        async with trio.open_nursery() as nursery:
            for side, other in ((a, b), (b, a), (a, b)):
                nursery.start_soon(want, side, other)
        assert paths == ["punched-tcp"] * 3
        await eventually(lambda: a.path == b.path == ["punched-tcp"])


async def test_who_wants_a_lane_gets_one_end_of_a_connection_and_the_peer_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two(MemoryNats()) as (a, b):
        stream = await a.signalling.open_lane_stream(b.swarm.peer_id)
        await eventually(lambda: bool(b.lanes))
        await stream.send_all(b"first bytes of a lane")
        assert await b.lanes[0].receive_some(100) == b"first bytes of a lane"
        assert stream.remote[0] == IPS[1]
        assert a.path == ["relay"]
        stream.close()


async def test_a_lane_does_not_go_over_udp(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats(tcp=False)) as (a, b):
        with pytest.raises(ConnectError, match="no connection for a lane"):
            await a.signalling.open_lane_stream(b.swarm.peer_id)


async def test_where_nothing_else_works_the_path_goes_by_a_turn_server_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turn = (TurnServer("turn:198.51.100.9:443?transport=tcp"),)
    async with two(MemoryNats(tcp=False, udp=False), turn) as (a, b):
        assert await a.signalling.traverse(b.swarm.peer_id) == "relay"
        await eventually(lambda: "/udp/" in next(iter(b.swarm.connections().values())).address)
        with pytest.raises(ConnectError):
            await a.signalling.traverse(b.swarm.peer_id)


async def test_who_stops_wanting_leaves_nothing_behind_on_either_side(autojump_clock: trio.testing.MockClock) -> None:
    nats = MemoryNats(tcp=False, udp=False)
    async with two(nats) as (a, b):
        for after_s in (0.0, 0.03, 0.1, 0.15, 0.2, 0.3, 1.0, 3.0):
            with trio.move_on_after(after_s) as scope:
                await a.signalling.traverse(b.swarm.peer_id)
            assert scope.cancelled_caught
            await trio.sleep(0.2)
            assert nats.open == 0
            await trio.sleep(4.0)


async def test_in_the_open_mesh_nothing_is_offered_and_nothing_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats()) as (a, b):
        b.allowed = False
        with pytest.raises(ConnectError, match="no way that we have"):
            await a.signalling.traverse(b.swarm.peer_id)
        with pytest.raises(ConnectError, match="private meshes only"):
            await b.signalling.traverse(a.swarm.peer_id)


async def test_when_a_network_changes_in_the_middle_the_attempt_begins_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nats = MemoryNats(tcp=False, udp=False)
    async with two(nats) as (a, b):

        async def change() -> None:
            await trio.sleep(1.0)
            a.signalling.network_changed()
            await trio.sleep(1.0)
            b.signalling.network_changed()
            nats.tcp = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            assert await a.signalling.traverse(b.swarm.peer_id) == "punched-tcp"
        await eventually(lambda: a.path == b.path == ["punched-tcp"])


# --- hostile ---------------------------------------------------------------------------------------------------------


def an_offer(number: int = 0, **more: Any) -> wire.Offer:
    candidates = more.pop("candidates", (Candidate("srflx", "tcp", IPS[0], 40_999),))
    return wire.Offer(number.to_bytes(wire.ATTEMPT_ID_BYTES, "big"), candidates=candidates, **more)


async def test_a_peer_that_offers_and_says_no_more_holds_one_attempt_for_its_time_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
        await FrameStream(stream).send(wire.MESSAGES, an_offer(udp=True))
        await trio.sleep(0.5)
        assert nats.open == 1
        await trio.sleep(ATTEMPT_S)
        assert nats.open == 0
        await stream.reset()


async def test_offers_without_end_hold_no_more_than_one_attempt(autojump_clock: trio.testing.MockClock) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        replies = []
        for number in range(40):
            stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
            frames = FrameStream(stream)
            await frames.send(wire.MESSAGES, an_offer(number))
            replies.append(await frames.receive(wire.MESSAGES))
            assert nats.open <= 2
        declined = [reply for reply in replies if isinstance(reply, wire.Decline) and reply.reason == "busy"]
        assert len(declined) > 25
        assert declined[0].retry_after_s > 0
        await trio.sleep(ATTEMPT_S + 1.0)


async def test_an_attempt_that_says_its_last_word_is_not_mixed_up_with_another_of_the_same_id(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = AttemptRun._clean

    async def slowly(self: AttemptRun, frames: FrameStream | None) -> None:
        await trio.sleep(0.5)
        await clean(self, frames)

    monkeypatch.setattr(AttemptRun, "_clean", slowly)
    async with two(MemoryNats()) as (a, b):
        heard: list[wire.Message] = []

        async def offer_again(stream: Stream) -> None:
            frames = FrameStream(stream)
            theirs = await frames.receive(wire.MESSAGES)
            await frames.send(wire.MESSAGES, wire.Decline(theirs.attempt, "not-offered"))
            await trio.sleep(0.1)
            again = FrameStream(await b.swarm.open_stream(a.swarm.peer_id, SIGNAL))
            await again.send(wire.MESSAGES, wire.Offer(theirs.attempt, "control", an_offer().candidates))
            heard.append(await again.receive(wire.MESSAGES))
            await again.send(wire.MESSAGES, wire.Decline(theirs.attempt, "withdrawn"))

        b.swarm.serve(SIGNAL, offer_again)
        with pytest.raises(ConnectError):
            await a.signalling.open_lane_stream(b.swarm.peer_id)
        await eventually(lambda: bool(heard))
        assert [type(each) for each in heard] == [wire.Decline]
        await trio.sleep(ATTEMPT_S + 1.0)
        assert not a.signalling._runs


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 40,
        b"\x00\x00\x00\x02\xc1\xc1",
        b"\x7f\xff\xff\xff",
        wire.MESSAGES.encode(wire.Go(bytes(wire.ATTEMPT_ID_BYTES))),
        b"",
    ],
)
async def test_garbage_in_place_of_an_offer_costs_the_stream_and_nothing_else(
    garbage: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
        await stream.send_all(garbage)
        with pytest.raises(PeerGone):
            await stream.receive_some(100)
        assert nats.open == 0
        assert await b.signalling.traverse(a.swarm.peer_id) == "punched-tcp"


@pytest.mark.parametrize("late", [b"\x7f\xff\xff\xff", b"\x00\x00\x00\x01\xc1"])
async def test_garbage_in_the_middle_ends_the_attempt_at_once(
    late: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
        await FrameStream(stream).send(wire.MESSAGES, an_offer())
        await stream.send_all(late)
        await trio.sleep(0.3)
        assert nats.open == 0


async def test_trickles_without_end_end_the_attempt(autojump_clock: trio.testing.MockClock) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
        frames, offer = FrameStream(stream), an_offer(udp=True)
        await frames.send(wire.MESSAGES, offer)
        with suppress(PeerGone):
            for _ in range(MAX_HEARD + 1):
                await frames.send(wire.MESSAGES, wire.Trickle(offer.attempt, offer.candidates))
        await trio.sleep(0.1)
        assert nats.open == 0


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "192.0.2.1", "10.0.0.1", "169.254.169.254", "224.0.0.251", "::1", "localhost", IPS[1]]
)
async def test_candidates_at_third_parties_loopback_or_ourselves_are_never_reached_for(
    ip: str, autojump_clock: trio.testing.MockClock
) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        b.addresses = (IPS[1],)
        stream = await a.swarm.open_stream(b.swarm.peer_id, SIGNAL)
        frames = FrameStream(stream)
        async with nats.side(IPS[0]).open_channel(()) as end:
            sdp = (await end.offer()).replace(IPS[0], ip)
            offer = an_offer(candidates=(Candidate("srflx", "tcp", ip, 40_999),), udp=True, sdp=sdp)
            await frames.send(wire.MESSAGES, offer)
            answer = await frames.receive(wire.MESSAGES)
            assert isinstance(answer, wire.Answer)
            await frames.send(wire.MESSAGES, wire.Go(offer.attempt))
            await trio.sleep(3.0)
            assert nats.packets == []
        await stream.reset()
        await trio.sleep(ATTEMPT_S)


async def test_a_stranger_at_the_punched_port_does_not_take_the_peers_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nats = MemoryNats(udp=False)
    async with two(nats) as (a, b):
        strangers: list[MemoryPunchPort] = []

        async def intrude() -> None:
            """Connects to the port of each side as soon as it runs, and says something else."""
            while len(strangers) < 2:
                for port, found in tuple(nats.running.items()):
                    if port not in strangers:
                        strangers.append(port)
                        near, far = nats.pair(("192.0.2.66", 6666), (port.ip, port.port))
                        await found.send(far)
                        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                            await near.send_all(b"GET / HTTP/1.1\r\n\r\n" * 20)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(intrude)
            assert await a.signalling.traverse(b.swarm.peer_id) == "punched-tcp"
        await eventually(lambda: a.path == b.path == ["punched-tcp"])


async def test_a_stranger_at_the_punched_port_does_not_become_a_lane(autojump_clock: trio.testing.MockClock) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):

        async def intrude() -> None:
            await eventually(lambda: bool(nats.running))
            for port, found in tuple(nats.running.items()):
                near, far = nats.pair(("192.0.2.66", 6666), (port.ip, port.port))
                await found.send(far)
                await near.send_all(b"x" * 64)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(intrude)
            stream = await a.signalling.open_lane_stream(b.swarm.peer_id)
        await eventually(lambda: bool(b.lanes))
        assert stream.remote[0] == IPS[1]
        assert [lane.remote[0] for lane in b.lanes] == [IPS[0]]
        stream.close()


@pytest.mark.parametrize("reason", ["glare", "restart", "busy", "withdrawn"])
async def test_a_peer_that_refuses_every_offer_costs_a_few_offers_and_an_error(
    reason: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with two(MemoryNats()) as (a, b):
        offers = 0

        async def refuse(stream: Stream) -> None:
            nonlocal offers
            frames = FrameStream(stream)
            offer = await frames.receive(wire.MESSAGES)
            offers += 1
            await frames.send(wire.MESSAGES, wire.Decline(offer.attempt, reason))

        b.swarm.serve(SIGNAL, refuse)
        started = trio.current_time()
        with pytest.raises((ConnectError, Busy)):
            await a.signalling.traverse(b.swarm.peer_id)
        assert 1 <= offers <= 4
        assert trio.current_time() - started < 14.0


async def test_a_peer_that_answers_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats()) as (a, b):

        async def swallow(stream: Stream) -> None:
            while await stream.receive_some(1000):
                pass

        b.swarm.serve(SIGNAL, swallow)
        started = trio.current_time()
        with pytest.raises(ConnectError, match="did not answer"):
            await a.signalling.traverse(b.swarm.peer_id)
        assert trio.current_time() - started < 5.0


async def test_a_peer_that_stops_reading_does_not_hold_an_attempt_beyond_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nats = MemoryNats(tcp=False, udp=False)
    async with two(nats) as (a, b):

        async def stall(_stream: Stream) -> None:
            await trio.sleep(60.0)

        b.swarm.serve(SIGNAL, stall)
        started = trio.current_time()
        with pytest.raises(ConnectError):
            await a.signalling.traverse(b.swarm.peer_id)
        assert trio.current_time() - started < ATTEMPT_S + 2.0


async def test_only_members_are_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with two(MemoryNats()) as (_, b):
        to, _ = b.swarm._answers[SIGNAL]
        assert to == "members"
