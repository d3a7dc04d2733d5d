"""A visit of the doctor in virtual time: how long it takes, whom it asks, what it tells on the way."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.doctor import BootstrapSeen, LookedBack, MachineFacts, PeerFacts, PortKind, RefusedPeer
from meshmax.base.ids import PeerId
from meshmax.base.status import PeerView
from meshmax.ports import Discovery, Sighting
from meshmax.services.doctor import BUDGET_S, LOOK_S, MAX_ASKED, Doctor
from meshmax.services.ladder import Ladder


class FakePatient:
    def __init__(self, peers: int) -> None:
        self.peers = peers
        self.machine_s = 0.5

    def online(self) -> tuple[PeerView, ...]:
        return tuple(PeerView(PeerId(f"peer{number}"), "online", "direct", None) for number in range(self.peers))

    def ports(self) -> tuple[tuple[PortKind, int], ...]:
        return (("control", 11435),)

    def refused(self) -> tuple[RefusedPeer, ...]:
        return (RefusedPeer(PeerId("stranger"), "/a", "you are in another mesh"),)

    def bootstrap(self) -> tuple[BootstrapSeen, ...]:
        return (BootstrapSeen("/b"),)

    def facts(self) -> PeerFacts:
        return PeerFacts(mesh="m")

    async def machine(self) -> MachineFacts:
        await trio.sleep(self.machine_s)
        return MachineFacts("/home", ("10.0.0.1",))


class FakeLookBack:
    """Each peer takes ``answer_s``."""

    def __init__(self, answer_s: float) -> None:
        self.answer_s = answer_s
        self.asked: list[PeerId] = []

    async def ask(self, peer_id: PeerId, name: str, ports: tuple[tuple[PortKind, int], ...]) -> LookedBack:
        assert ports == (("control", 11435),)
        self.asked.append(peer_id)
        await trio.sleep(self.answer_s)
        return LookedBack(peer_id, name, "out")


class Answering:
    """A rung that names somebody a moment after it was told to look."""

    def __init__(self, name: str, after_s: float) -> None:
        self.name, self.after_s = name, after_s
        self.told = trio.Event()

    def look_again(self) -> None:
        self.told.set()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        while True:
            await self.told.wait()
            self.told = trio.Event()
            await trio.sleep(self.after_s)
            await found.send(Sighting(PeerId("peer0"), (), "mdns"))


@asynccontextmanager
async def examined(patient: FakePatient, look_back: FakeLookBack, *rungs: Discovery) -> AsyncIterator[Doctor]:
    ladder = Ladder(rungs, random.Random(1), off={"dht": "not configured"})
    send, receive = trio.open_memory_channel[Sighting](100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ladder.run, send)
        await trio.sleep(1)
        yield Doctor(patient, ladder, look_back)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()
    receive.close()


async def nobody(_words: str) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_visit_looks_asks_and_says_so(autojump_clock: trio.testing.MockClock) -> None:
    steps: list[str] = []

    async def step(words: str) -> None:
        await trio.lowlevel.checkpoint()
        steps.append(words)

    async with examined(FakePatient(2), FakeLookBack(0.1), Answering("mdns", 0.25)) as doctor:
        diagnosis = await doctor.visit(step)
    assert steps == ["looking at this machine and climbing the rungs of discovery", "asking 2 peers to look back"]
    peer = diagnosis.facts.peer
    assert peer is not None
    assert (peer.online, peer.not_asked, peer.mesh) == (2, 0, "m")
    assert [told.peer_id for told in peer.looked_back] == ["peer0", "peer1"]
    mdns, dht = peer.rungs
    assert (mdns.report.name, mdns.found_now) == ("mdns", 1)
    assert mdns.first_s == pytest.approx(0.25)
    assert (dht.report.state, dht.found_now, dht.first_s) == ("off", 0, None)
    assert peer.bootstrap[0].address == "/b"
    assert peer.refused[0].peer_id == "stranger"
    assert diagnosis.took_s < LOOK_S


async def test_a_visit_stays_within_its_time_however_slow_peers_and_rungs_are(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with examined(FakePatient(50), FakeLookBack(5.0), Answering("mdns", 1e9)) as doctor:
        diagnosis = await doctor.visit(nobody)
    assert diagnosis.took_s < BUDGET_S


async def test_no_more_than_a_few_peers_are_asked_the_nearest_first(autojump_clock: trio.testing.MockClock) -> None:
    look_back = FakeLookBack(0.1)
    async with examined(FakePatient(50), look_back) as doctor:
        diagnosis = await doctor.visit(nobody)
    assert sorted(look_back.asked) == sorted(f"peer{number}" for number in range(MAX_ASKED))
    assert diagnosis.facts.peer is not None
    assert diagnosis.facts.peer.not_asked == 50 - MAX_ASKED


async def test_visits_follow_each_other(autojump_clock: trio.testing.MockClock) -> None:
    look_back = FakeLookBack(1.0)
    async with examined(FakePatient(1), look_back) as doctor:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(doctor.visit, nobody)
        assert trio.current_time() - began >= 3 * 1.0
    assert len(look_back.asked) == 3


async def test_a_visit_that_is_cancelled_lets_the_next_one_in(autojump_clock: trio.testing.MockClock) -> None:
    async with examined(FakePatient(1), FakeLookBack(0.1)) as doctor:
        with trio.move_on_after(0.2):
            await doctor.visit(nobody)
        with trio.fail_after(20):
            await doctor.visit(nobody)
