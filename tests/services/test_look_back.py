"""Looking back between two peers of the in-memory network, in virtual time, and what a hostile one can do."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.doctor import PortSeen, TriedOutcome
from meshmax.base.errors import Busy, RemoteProtocolError
from meshmax.base.reachability import NatBehaviour
from meshmax.ports import Sighting, Stream
from meshmax.services.frames import FrameStream
from meshmax.services.ladder import Ladder
from meshmax.services.look_back import ASK_TIMEOUT_S, LookBack, _ip_of
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire import look_back as wire
from meshmax.wire.failure import Failure
from meshmax.wire.protocols import LOOK_BACK

NOW_S = 1.8e9
NONCE = b"n" * wire.NONCE_BYTES


class Sees:
    name = "mdns"

    def __init__(self, *others: MemorySwarm) -> None:
        self.others = others

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        for other in self.others:
            await found.send(Sighting(other.peer_id, other.addresses, "mdns"))
        await trio.sleep_forever()


class Cable:
    """Two UDP ports; what is sent to one arrives at the other unless the cable is cut."""

    def __init__(self) -> None:
        self.other: Cable | None = None
        self.addresses: tuple[tuple[str, int], ...] = (("10.0.0.1", 11435),)
        self.sent: list[tuple[bytes, tuple[str, int]]] = []
        self.on_datagram: Callable[[bytes, tuple[str, int]], None] = lambda data, sender: None

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        self.sent.append((data, to))
        if self.other is not None:
            self.other.on_datagram(data, ("10.0.0.1", 11435))

    def receive(self, first_bytes: range, on_datagram: Callable[[bytes, tuple[str, int]], None]) -> None:
        assert first_bytes == range(wire.PROBE_FIRST_BYTE, wire.PROBE_FIRST_BYTE + 1)
        self.on_datagram = on_datagram


class Side:
    """One of two peers. ``knocked``: what it was asked to knock at."""

    def __init__(self, swarm: MemorySwarm, seen: tuple[MemorySwarm, ...], ahead_s: float) -> None:
        self.swarm, self.cable = swarm, Cable()
        self.knocked: list[tuple[str, int]] = []
        self.outcome: TriedOutcome = "open"
        self.knock_s = 0.0
        self.nat: NatBehaviour | None = None
        self.ladder = Ladder([Sees(*seen)], random.Random(1), off={"dht": "not configured"})
        self.look_back = LookBack(
            swarm, self.ladder, self.knock, lambda: NOW_S + ahead_s + trio.current_time(), self.cable, lambda: self.nat
        )

    async def knock(self, ip: str, port: int) -> TriedOutcome:
        self.knocked.append((ip, port))
        await trio.sleep(self.knock_s)
        return self.outcome


@asynccontextmanager
async def two(b_sees_a: bool = True, ahead_s: float = 0.0) -> AsyncIterator[tuple[Side, Side]]:
    """A and B; A sees B; B comes from 10.0.0.1 as its streams tell."""
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as a, network.open_swarm(SeededSigner(2)) as b:
        first, second = Side(a, (b,), 0.0), Side(b, (a,) if b_sees_a else (), ahead_s)
        first.cable.other, second.cable.other = second.cable, first.cable
        async with trio.open_nursery() as nursery:
            for side in (first, second):
                send, receive = trio.open_memory_channel[Sighting](100)
                nursery.start_soon(side.ladder.run, send)
                nursery.start_soon(drain, receive)
            await a.dial(b.peer_id, b.addresses)
            await trio.sleep(1)
            yield first, second
            nursery.cancel_scope.cancel()


async def drain(source: trio.MemoryReceiveChannel[Sighting]) -> None:
    async for _ in source:
        pass


def at(monkeypatch: pytest.MonkeyPatch, ip: str) -> None:
    """Memory addresses have no IP: the asked peer reads this one in them."""
    monkeypatch.setattr("meshmax.services.look_back._ip_of", lambda address: ip)


async def test_a_peer_tells_by_which_rungs_it_sees_the_asker(autojump_clock: trio.testing.MockClock) -> None:
    async with two() as (a, b):
        told = await a.look_back.ask(b.swarm.peer_id, "b", [])
        assert told.why == ""
        assert [(seen.rung, seen.addresses) for seen in told.theirs] == [("mdns", a.swarm.addresses)]
        assert [seen.rung for seen in told.ours] == ["mdns"]
        assert told.their_rungs == ("mdns",)


async def test_a_peer_that_does_not_see_the_asker_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with two(b_sees_a=False) as (a, b):
        told = await a.look_back.ask(b.swarm.peer_id, "b", [])
        assert (told.theirs, told.their_rungs) == ((), ("mdns",))


async def test_clocks_are_compared_in_the_middle_of_the_round_trip(autojump_clock: trio.testing.MockClock) -> None:
    async with two(ahead_s=-10_800.0) as (a, b):
        b.knock_s = 1.5
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("control", 11435)])
        assert told.clock_ahead_s is not None
        assert abs(told.clock_ahead_s + 10_800.0) <= told.uncertain_s
        assert told.uncertain_s < 1.0


async def test_ports_are_tried_where_the_asker_comes_from(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        b.outcome = "silent"
        ports = [("control", 11435), ("lane", 11436), ("udp", 11437)]
        told = await a.look_back.ask(b.swarm.peer_id, "b", ports)  # type: ignore[arg-type]
        assert sorted(b.knocked) == [("10.0.0.1", 11435), ("10.0.0.1", 11436)]
        assert {port.kind: port for port in told.ports} == {
            "control": PortSeen("control", 11435, "silent"),
            "lane": PortSeen("lane", 11436, "silent"),
            "udp": PortSeen("udp", 11437, "arrived"),
        }
        assert b.cable.sent[0][1] == ("10.0.0.1", 11437)
        assert a.knocked == []


async def test_a_probe_that_does_not_come_is_lost(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        b.cable.other = None
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("udp", 11437)])
        assert told.ports == (PortSeen("udp", 11437, "lost"),)


@pytest.mark.parametrize("bound", ["fd00::1", "127.0.0.1"])
async def test_a_probe_that_cannot_be_sent_says_nothing_of_the_askers_port(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        b.cable.addresses = ((bound, 11435),)
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("udp", 11437)])
        assert told.ports == (PortSeen("udp", 11437, "not_tried"),)


async def test_a_probe_with_another_nonce_counts_for_nothing(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        b.cable.other = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spray, a.cable)
            told = await a.look_back.ask(b.swarm.peer_id, "b", [("udp", 11437)])
        assert told.ports == (PortSeen("udp", 11437, "lost"),)


async def spray(cable: Cable) -> None:
    for number in range(100):
        cable.on_datagram(wire.probe_of(number.to_bytes(wire.NONCE_BYTES, "big")), ("10.0.0.9", 1))
        await trio.sleep(0.01)


async def test_behind_a_relay_nothing_is_tried(autojump_clock: trio.testing.MockClock) -> None:
    async with two() as (a, b):
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("control", 11435), ("udp", 11435)])
        assert {port.outcome for port in told.ports} == {"not_tried"}
        assert (b.knocked, b.cable.sent) == ([], [])


async def test_a_port_of_the_systems_own_is_not_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    async with two() as (a, b):
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("control", 22)])
        assert (told.why, told.ports) == ("", ())


async def test_who_asks_again_and_again_is_told_to_wait_and_costs_no_knocks(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        for _ in range(100):
            await ask_raw(a, b)
        assert len(b.knocked) <= 5
        reply = await ask_raw(a, b)
        assert isinstance(reply, Failure)
        assert reply.code == Busy.code


async def ask_raw(a: Side, b: Side) -> wire.FromAsked:
    stream = await a.swarm.open_stream(b.swarm.peer_id, LOOK_BACK)
    frames = FrameStream(stream)
    await frames.send(wire.FROM_ASKER, wire.Look(NONCE, (wire.PortAsk("control", 11435),) * 3))
    reply = await frames.receive(wire.FROM_ASKED)
    await stream.reset()
    return reply


async def test_one_question_brings_one_knock_a_kind(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "10.0.0.1")
    async with two() as (a, b):
        await ask_raw(a, b)
        assert b.knocked == [("10.0.0.1", 11435)]


async def test_a_peer_that_never_answers_costs_no_longer_than_the_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def mute(_stream: Stream) -> None:
        await trio.sleep_forever()

    async with two() as (a, b):
        b.swarm.serve(LOOK_BACK, mute)
        began = trio.current_time()
        told = await a.look_back.ask(b.swarm.peer_id, "b", [])
        assert trio.current_time() - began == pytest.approx(ASK_TIMEOUT_S)
        assert "did not answer" in told.why


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"", b"\x00\x00\x00\x02\x81"])
async def test_a_peer_that_answers_garbage_is_a_sentence(
    autojump_clock: trio.testing.MockClock, garbage: bytes
) -> None:
    async def babble(stream: Stream) -> None:
        await stream.send_all(garbage)
        await stream.aclose()

    async with two() as (a, b):
        b.swarm.serve(LOOK_BACK, babble)
        told = await a.look_back.ask(b.swarm.peer_id, "b", [])
        assert told.why
        assert told.clock_ahead_s is None


@pytest.mark.parametrize("nat", [None, NatBehaviour(udp="blocked", mapping="endpoint-independent")])
async def test_a_peer_tells_what_its_nat_does(autojump_clock: trio.testing.MockClock, nat: NatBehaviour | None) -> None:
    async with two() as (a, b):
        b.nat = nat
        assert (await a.look_back.ask(b.swarm.peer_id, "b", [])).nat == nat


async def test_an_address_of_a_relay_is_not_taken_for_ours(autojump_clock: trio.testing.MockClock) -> None:
    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(wire.FROM_ASKER)
        where = f"/ip4/203.0.113.9/tcp/11435/p2p/{stream.peer}/p2p-circuit"
        await frames.send(wire.FROM_ASKED, wire.Seen((), where, NOW_S, ()))

    async with two() as (a, b):
        b.swarm.serve(LOOK_BACK, answer)
        assert (await a.look_back.ask(b.swarm.peer_id, "b", [])).address == ""


async def test_what_a_peer_says_of_ports_that_nobody_asked_about_counts_for_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def lie(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(wire.FROM_ASKER)
        tried = (wire.PortTried("control", 22, "refused"), wire.PortTried("lane", 11436, "silent"))
        await frames.send(wire.FROM_ASKED, wire.Seen((), "/ip4/9.9.9.9/tcp/1", NOW_S, tried))

    async with two() as (a, b):
        b.swarm.serve(LOOK_BACK, lie)
        told = await a.look_back.ask(b.swarm.peer_id, "b", [("control", 11435)])
        assert told.ports == (PortSeen("control", 11435, "not_tried"),)


@pytest.mark.parametrize(
    ("address", "ip"),
    [
        ("/ip4/10.0.0.1/tcp/40000", "10.0.0.1"),
        ("/ip6/fd00::1/tcp/1", "fd00::1"),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/1", "fe80::1%eth0"),
        ("/dns/example.org/tcp/1", ""),
        ("/ip4/10.0.0.1/tcp/1/p2p/x/p2p-circuit", ""),
        ("", ""),
    ],
)
def test_only_an_ip_address_that_a_connection_comes_from_is_knocked_at(address: str, ip: str) -> None:
    assert _ip_of(address) == ip


async def test_who_opens_a_stream_and_asks_nothing_is_hung_up_on(autojump_clock: trio.testing.MockClock) -> None:
    async with two() as (a, b):
        stream = await a.swarm.open_stream(b.swarm.peer_id, LOOK_BACK)
        with pytest.raises(RemoteProtocolError), trio.fail_after(20):
            await b.look_back.answer(Silent(a.swarm.peer_id))  # type: ignore[arg-type]
        await stream.reset()


class Silent:
    """A stream on which nothing ever comes."""

    address = ""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.sleep_forever()


async def test_a_peer_that_is_not_connected_is_a_sentence(autojump_clock: trio.testing.MockClock) -> None:
    async with two() as (a, _):
        told = await a.look_back.ask(SeededSigner(9).peer_id, "x", [])
        assert "not connected" in told.why
