"""The ladder in virtual time: rungs that fail, hang, flood and end, side by side."""

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId, peer_id_of
from meshmax.ports import Discovery, Sighting
from meshmax.services.ladder import BURST, PACE_PER_S, Ladder
from meshmax.services.network_watch import NetworkWatch

A = peer_id_of(b"\x01" * 32)
B = peer_id_of(b"\x02" * 32)


class Rung:
    """Names ``peer`` each second. ``error`` is raised by each run at once while it is set."""

    def __init__(self, name: str, peer: PeerId = A, error: BaseException | None = None) -> None:
        self.name, self.peer, self.error = name, peer, error
        self.runs = 0

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        self.runs += 1
        if self.error is not None:
            raise self.error
        while True:
            await found.send(Sighting(self.peer, ("/ip4/10.0.0.1/tcp/1",), "mdns"))
            await trio.sleep(1)


class Hanging:
    name = "hanging"

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        await trio.sleep_forever()


class Ending:
    name = "ending"

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        await trio.lowlevel.checkpoint()


class Flooding:
    name = "flooding"
    sent = 0

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        while True:
            await found.send(Sighting(PeerId(str(self.sent)), (), "dht"))
            self.sent += 1


class Looking(Rung):
    """Names its peer only when it is told to look."""

    def __init__(self) -> None:
        super().__init__("looking", B)
        self.told = trio.Event()

    def look_again(self) -> None:
        self.told.set()
        self.told = trio.Event()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        while True:
            await self.told.wait()
            await trio.sleep(0.25)
            await found.send(Sighting(self.peer, (), "rendezvous"))


class Collected:
    """What came off the ladder."""

    def __init__(self) -> None:
        self.sightings: list[tuple[float, Sighting]] = []

    async def run(self, source: trio.MemoryReceiveChannel[Sighting]) -> None:
        async for sighting in source:
            self.sightings.append((trio.current_time(), sighting))

    def peers(self) -> set[PeerId]:
        return {sighting.peer_id for _, sighting in self.sightings}


@asynccontextmanager
async def climbed(*rungs: Discovery, network: NetworkWatch | None = None) -> AsyncIterator[tuple[Ladder, Collected]]:
    ladder, collected = Ladder(rungs, random.Random(1), network, {"dht": "not configured"}), Collected()
    send, receive = trio.open_memory_channel[Sighting](64)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collected.run, receive)
        nursery.start_soon(ladder.run, send)
        yield ladder, collected
        nursery.cancel_scope.cancel()


UNREACHABLE = OSError(errno.EHOSTUNREACH, "No route to host")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UNREACHABLE, "No route to host"),
        (ExceptionGroup("g", [ExceptionGroup("h", [UNREACHABLE]), PeerGone("gone")]), "No route to host"),
        (PeerGone("no network"), "no network"),
        (ZeroDivisionError("oops"), "ZeroDivisionError"),
        (ExceptionGroup("g", [ZeroDivisionError("oops"), UNREACHABLE]), "ZeroDivisionError"),
    ],
)
async def test_a_rung_that_fails_is_climbed_again_and_stops_no_other(
    autojump_clock: trio.testing.MockClock, error: Exception, told: str
) -> None:
    failing, working = Rung("failing", error=error), Rung("working")
    async with climbed(failing, Hanging(), working) as (ladder, collected):
        await trio.sleep(60)
        reports = {report.name: report for report in ladder.reports()}
        assert collected.peers() == {A}
    assert 3 <= failing.runs <= 20
    assert (reports["failing"].state, reports["failing"].restarts) == ("failing", failing.runs)
    assert told in reports["failing"].problem
    assert (reports["working"].state, reports["working"].found) == ("working", 1)
    assert reports["working"].first_found_s == pytest.approx(0.0, abs=0.01)
    assert (reports["hanging"].state, reports["hanging"].found) == ("working", 0)
    assert (reports["dht"].state, reports["dht"].problem) == ("off", "not configured")


async def test_a_rung_that_recovers_is_reported_as_working(autojump_clock: trio.testing.MockClock) -> None:
    rung = Rung("mdns", error=UNREACHABLE)
    async with climbed(rung) as (ladder, collected):
        await trio.sleep(5)
        rung.error = None
        await trio.sleep(40)
        (report, _) = ladder.reports()
        assert (report.state, report.problem) == ("working", "")
        assert collected.peers() == {A}


async def test_a_rung_that_ends_is_off_and_the_others_go_on(autojump_clock: trio.testing.MockClock) -> None:
    async with climbed(Ending(), Rung("working")) as (ladder, collected):
        await trio.sleep(10)
        assert [report.state for report in ladder.reports()] == ["off", "off", "working"]
        assert len(collected.sightings) >= 10


async def test_a_flood_on_one_rung_is_paced_and_delays_no_other(autojump_clock: trio.testing.MockClock) -> None:
    flooding = Flooding()
    async with climbed(flooding, Rung("working")) as (_, collected):
        await trio.sleep(100)
    of_flood = [s for _, s in collected.sightings if s.source == "dht"]
    assert len(of_flood) <= BURST + 100 * PACE_PER_S + 1
    assert len([s for _, s in collected.sightings if s.source == "mdns"]) >= 99


async def test_a_rung_that_fails_while_it_is_cancelled_does_not_fail_the_ladder(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Ragged:
        name = "ragged"

        async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    await trio.sleep_forever()
                finally:
                    raise OSError(errno.ENETDOWN, "Network is down")

    async with climbed(Ragged(), Rung("working")) as (_, collected):
        await trio.sleep(3)
    assert collected.peers() == {A}


async def test_a_change_of_the_network_ends_pauses_and_makes_rungs_look(autojump_clock: trio.testing.MockClock) -> None:
    mine = ["10.0.0.2"]
    network = NetworkWatch(lambda: mine, trio.current_time)
    failing, looking = Rung("failing", error=UNREACHABLE), Looking()
    async with climbed(failing, looking, network=network) as (_, collected), trio.open_nursery() as nursery:
        nursery.start_soon(network.run)
        await trio.sleep(300)
        failing.error = None
        mine.append("10.1.0.2")
        changed_at = trio.current_time()
        await trio.sleep(3.5)
        assert {s.peer_id for at, s in collected.sightings if at > changed_at} == {A, B}
        nursery.cancel_scope.cancel()


async def test_a_look_tells_what_each_rung_finds_now(autojump_clock: trio.testing.MockClock) -> None:
    async with climbed(Looking(), Hanging()) as (ladder, _):
        await trio.sleep(10)
        ladder.look()
        await trio.sleep(1)
        assert ladder.looked() == {"looking": (1, pytest.approx(0.25)), "hanging": (0, None)}
        (seen,) = ladder.seen(B)
        assert seen.rung == "looking"
        assert seen.ago_s == pytest.approx(0.75)
