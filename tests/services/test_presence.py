"""Presence over the in-memory network, in virtual time: meeting, hearing of each other, losing a frozen peer."""

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Signed
from meshmax.base.status import Load, ModelPresence, PeerStatus
from meshmax.core.sequence import StatusSequence
from meshmax.ports import Sighting, Stream
from meshmax.services.frames import FrameStream
from meshmax.services.ladder import Ladder
from meshmax.services.presence import BEAT_PACE_S, MAX_STATUS_STREAMS, PresenceService, open_presence
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.protocols import STATUS
from meshmax.wire.status import BEAT, ECHO, Beat, read_status


class Told:
    """A rung that was told where everybody is."""

    name = "told"

    def __init__(self, *sightings: Sighting) -> None:
        self.sightings = sightings

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        for sighting in self.sightings:
            await found.send(sighting)


class Failing:
    """A rung whose network is down."""

    name = "failing"
    runs = 0

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        self.runs += 1
        raise PeerGone("no network")


class Site:
    """Peers on one memory network."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.network = MemoryNetwork()
        self.stack = stack
        self.swarms: list[MemorySwarm] = []
        self.presences: list[PresenceService] = []
        self.loads: list[Load] = []
        self.models: list[tuple[ModelPresence, ...]] = []

    async def peer(self, *rungs: Failing, knows: int | None = None) -> PresenceService:
        """A new peer that was told of the first ``knows`` others (None: of all)."""
        signer = SeededSigner(len(self.swarms) + 1)
        swarm = await self.stack.enter_async_context(self.network.open_swarm(signer))
        told = Told(*(Sighting(other.peer_id, other.addresses, "static") for other in self.swarms[:knows]))
        number = len(self.swarms)
        self.loads.append(Load())
        self.models.append(())
        presence = await self.stack.enter_async_context(
            open_presence(
                swarm,
                signer,
                Config(),
                lambda: PeerStatus(
                    signer.peer_id, 0, 0, f"peer{number}", "0", load=self.loads[number], models=self.models[number]
                ),
                Ladder([told, *rungs], random.Random(number)),
                lambda: 1_700_000_000.0 + trio.current_time(),
                random.Random(number),
            )
        )
        self.swarms.append(swarm)
        self.presences.append(presence)
        return presence


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(stack)


def online(presence: PresenceService) -> set[str]:
    return {view.status.name for view in presence.peers() if view.state == "online" and view.status}


async def test_peers_meet_and_hear_each_others_names_and_round_trips(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b = await site.peer(), await site.peer()
        await trio.sleep(5)
        assert online(a) == {"peer1"}
        assert online(b) == {"peer0"}
        (view,) = a.peers()[1:]
        assert view.rtt_s == pytest.approx(2 * site.network.latency_s)


async def test_peers_that_were_told_of_one_neighbour_find_the_others_through_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(knows=1), await site.peer(knows=1)
        await trio.sleep(10)
        assert len(online(a)) == len(online(b)) == len(online(c)) == 2


async def test_a_change_of_status_reaches_the_neighbours_within_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b = await site.peer(), await site.peer()
        await trio.sleep(5.3)
        site.loads[0] = Load(running=3)
        a.changed()
        await trio.sleep(1)
        view = b.view(site.swarms[0].peer_id)
        assert view
        assert view.status
        assert view.status.load.running == 3


async def test_a_frozen_peer_is_noticed_within_ten_seconds_and_shown_as_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, _ = await site.peer(), await site.peer()
        await trio.sleep(5)
        site.network.freeze(site.swarms[1].peer_id)
        await trio.sleep(10)
        assert online(a) == set()
        assert [view.state for view in a.peers()] == ["self", "offline"]
        await trio.sleep(590)
        assert [view.state for view in a.peers()] == ["self"]
        (lost,) = a.lost()
        assert lost.state == "offline"
        assert lost.status
        assert lost.status.name == "peer1"


async def test_a_peer_that_comes_back_is_met_again_without_a_person(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, _ = await site.peer(), await site.peer()
        await trio.sleep(5)
        site.network.freeze(site.swarms[1].peer_id)
        await trio.sleep(30)
        site.network.thaw(site.swarms[1].peer_id)
        await trio.sleep(75)
        assert online(a) == {"peer1"}


async def test_a_rung_that_fails_is_climbed_again_and_stops_no_other(autojump_clock: trio.testing.MockClock) -> None:
    failing = Failing()
    async with open_site() as site:
        await site.peer()
        b = await site.peer(failing)
        await trio.sleep(60)
        assert online(b) == {"peer0"}
        assert 3 <= failing.runs <= 20


async def test_garbage_on_the_status_protocol_costs_the_stream_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, _ = await site.peer(), await site.peer()
        await trio.sleep(5)
        stream = await site.swarms[1].open_stream(site.swarms[0].peer_id, STATUS)
        await stream.send_all(b"\xff\xff\xff\xff" + b"x" * 1000)
        with contextlib.suppress(PeerGone):
            while await stream.receive_some(100):
                pass
        await trio.sleep(5)
        assert online(a) == {"peer1"}


async def beats_answered(swarm: MemorySwarm, peer: PeerId, within_s: float) -> int:
    """How many heartbeats on one stream are answered in that time, sent as fast as they are."""
    frames, answered = FrameStream(await swarm.open_stream(peer, STATUS)), 0
    ends_at = trio.current_time() + within_s
    while trio.current_time() < ends_at:
        await frames.send(BEAT, Beat(answered))
        await frames.receive(ECHO)
        answered += 1
    return answered


async def read_out(stream: Stream) -> None:
    with trio.fail_after(2):
        while await stream.receive_some(100):
            pass


async def test_a_peer_that_beats_without_pause_is_answered_at_a_measured_pace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        await site.peer()
        await site.peer()
        await trio.sleep(5)
        answered = await beats_answered(site.swarms[1], site.swarms[0].peer_id, 10.0)
        assert 5 <= answered <= 10.0 / BEAT_PACE_S + 1


async def test_status_streams_of_one_peer_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, _ = await site.peer(), await site.peer()
        await trio.sleep(5)
        streams = [await site.swarms[1].open_stream(site.swarms[0].peer_id, STATUS) for _ in range(MAX_STATUS_STREAMS)]
        with pytest.raises(PeerGone):
            await read_out(streams[-1])
        await trio.sleep(10)
        assert online(a) == {"peer1"}


async def test_a_status_that_is_known_already_is_not_checked_again(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[PeerId, bytes]] = []

    def counted(signed: Signed) -> PeerStatus:
        read.append((signed.signer, signed.payload))
        return read_status(signed)

    monkeypatch.setattr("meshmax.services.heartbeat.read_status", counted)
    async with open_site() as site:
        for _ in range(5):
            await site.peer()
        await trio.sleep(60)
        assert all(len(online(presence)) == 4 for presence in site.presences)
    # Each of the five is checked once by each of the four others, plus what crossed on the way.
    assert len(read) < 1.5 * 4 * len(set(read))


async def test_statuses_that_nobody_asked_for_cost_no_check(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[PeerId] = []

    def counted(signed: Signed) -> PeerStatus:
        read.append(signed.signer)
        return read_status(signed)

    monkeypatch.setattr("meshmax.services.heartbeat.read_status", counted)
    made_up = tuple(Signed(SeededSigner(seed).peer_id, b"x", bytes(64)) for seed in range(100, 164))
    async with open_site() as site:
        await site.peer()
        await site.peer()
        await trio.sleep(5)
        frames = FrameStream(await site.swarms[1].open_stream(site.swarms[0].peer_id, STATUS))
        for nonce in range(10):
            await frames.send(BEAT, Beat(nonce, made_up))
            await frames.receive(ECHO)
        assert not set(read) & {signed.signer for signed in made_up}


async def test_a_peer_with_an_odd_model_stays_in_the_mesh(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, _ = await site.peer(), await site.peer()
        odd = ModelPresence(Sha256("a" * 64), ("h/n/m:t",), "disk", 1, family="\x1b[2J", context_length=1 << 63)
        site.models[0] = (odd,)
        a.changed()
        await trio.sleep(10)
        assert online(a) == {"peer1"}
        view = site.presences[1].view(site.swarms[0].peer_id)
        assert view
        assert view.status
        assert [model.digest for model in view.status.models] == [odd.digest]


async def test_a_program_that_does_not_speak_our_protocols_is_left_in_peace(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site() as site:
        foreign = await site.stack.enter_async_context(site.network.open_swarm(SeededSigner(1)))
        site.swarms.append(foreign)
        site.loads.append(Load())
        site.models.append(())
        a = await site.peer()
        swarm, visits = site.swarms[1], 0
        dial = swarm.dial

        async def counted(peer_id: PeerId, addresses: Sequence[str]) -> None:
            nonlocal visits
            visits += 1
            await dial(peer_id, addresses)

        monkeypatch.setattr(swarm, "dial", counted)
        await trio.sleep(600)
        assert 3 <= visits <= 25  # soon at first, then about once a minute
        assert online(a) == set()


async def test_a_peer_that_comes_back_with_an_earlier_clock_is_heard(autojump_clock: trio.testing.MockClock) -> None:
    kept: list[int] = []

    async def keep(bound: int) -> None:
        await trio.lowlevel.checkpoint()
        kept.append(bound)

    async with open_site() as site:
        watcher = await site.peer()
        for clock_s in (1_800_000_000.0, 1_700_000_000.0):  # a hundred million seconds are lost
            async with AsyncExitStack() as life:
                signer = SeededSigner(9)
                swarm = await life.enter_async_context(site.network.open_swarm(signer))
                opened = open_presence(
                    swarm,
                    signer,
                    Config(),
                    partial(PeerStatus, signer.peer_id, 0, 0, f"at {clock_s:g}", "0"),
                    Told(Sighting(site.swarms[0].peer_id, site.swarms[0].addresses, "static")),
                    lambda clock_s=clock_s: clock_s + trio.current_time(),  # type: ignore[misc]
                    random.Random(9),
                    StatusSequence(kept[-1] if kept else 0),
                    keep,
                )
                await life.enter_async_context(opened)
                await trio.sleep(60)
                assert online(watcher) == {f"at {clock_s:g}"}
    assert 2 <= len(kept) <= 4
