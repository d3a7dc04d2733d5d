"""Presence while connections change: real libp2p swarms on a simulated cable, in simulated time."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus
from meshmax.net import limits
from meshmax.services.heartbeat import SILENT_S
from meshmax.services.ladder import Ladder
from meshmax.services.presence import PresenceService, open_presence
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.protocols import STATUS
from tests.net.test_moves import Site, echo_nothing, open_site

Clock = trio.testing.MockClock
MAPPED = "/ip4/203.0.113.1/tcp/1/direct"


class Pair:
    """Two peers and their presence; ``a`` tells that MAPPED is mapped by its router."""

    def __init__(self, site: Site, a: PresenceService, b: PresenceService) -> None:
        self.site, self.a, self.b = site, a, b

        self.silent: list[float] = []  # when b was, at a

    def shown(self, presence: PresenceService) -> tuple[str, str, float | None]:
        """Its one peer: the path, the state, and the round trip in ms."""
        (view,) = presence.peers()[1:]
        return view.path, view.state, None if view.rtt_s is None else round(view.rtt_s * 1000)


@asynccontextmanager
async def open_pair(state: str = "unknown") -> AsyncIterator[Pair]:
    async with open_site(echo_nothing, latency_s=0.02) as site, AsyncExitStack() as stack:
        silent: list[float] = []
        presences = [
            await stack.enter_async_context(
                open_presence(
                    swarm,
                    SeededSigner(seed),
                    Config(),
                    partial(PeerStatus, swarm.peer_id, 0, 0, "x", "0", mapped=(MAPPED,) if seed == 1 else ()),
                    Ladder((), random.Random(seed)),
                    lambda: 1e9 + trio.current_time(),
                    random.Random(seed),
                    stand=lambda: state,  # type: ignore[arg-type, return-value]
                    on_silent=partial(note_silence, silent) if seed == 1 else lambda peer_id: None,
                )
            )
            for seed, swarm in ((1, site.a), (2, site.b))
        ]
        pair = Pair(site, *presences)
        pair.silent = silent
        yield pair


def note_silence(silent: list[float], peer_id: PeerId) -> None:
    silent.append(trio.current_time())


async def test_a_peer_that_lets_a_beat_wait_is_told_of_long_before_it_is_given_up(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        stream = await pair.site.join("direct")
        await trio.sleep(60)
        assert pair.silent == []
        pair.site.partition(stream)
        began = trio.current_time()
        await trio.sleep(4)
        (silent_s,) = pair.silent
        assert silent_s - began <= Config().heartbeat_s + SILENT_S + 0.1
        assert pair.shown(pair.a)[1] == "online"


async def test_the_heartbeat_moves_at_once_and_the_round_trip_is_measured_afresh(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        await pair.site.join("relay", latency_s=0.2)
        await trio.sleep(10)
        for presence in (pair.a, pair.b):
            path, state, rtt_ms = pair.shown(presence)
            assert (path, state) == ("relay", "online")
            assert rtt_ms is not None
            assert rtt_ms > 400
        await pair.site.join("punched-tcp")
        await trio.sleep(0.2)
        for presence in (pair.a, pair.b):
            path, state, rtt_ms = pair.shown(presence)
            assert (path, state) == ("punched-tcp", "online")
            assert rtt_ms is not None
            assert rtt_ms < 50
        await trio.sleep(2 * limits.LINK_IDLE_S)
        assert pair.site.links(pair.site.a) == pair.site.links(pair.site.b) == ["punched-tcp"]
        assert pair.site.a.streams(pair.site.b.peer_id) == 2  # a heartbeat each way


async def test_a_peer_whose_relay_breaks_while_its_direct_connection_lives_is_not_gone(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        relay = await pair.site.join("relay")
        await trio.sleep(5)
        await pair.site.join("punched-udp")
        await trio.sleep(0.5)
        async with pair.site.a.subscribe() as events:
            assert (await events.receive()).kind == "connected"
            relay.close()
            for _ in range(100):
                await trio.sleep(0.1)
                assert pair.shown(pair.a)[:2] == ("punched-udp", "online")
                assert pair.shown(pair.b)[:2] == ("punched-udp", "online")
            assert events.statistics().tasks_waiting_send == 0


async def test_a_peer_whose_direct_connection_falls_silent_goes_on_over_the_relay_that_is_in_use(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as pair:
        await pair.site.join("relay")
        await trio.sleep(5)
        held = await pair.site.a.open_stream(pair.site.b.peer_id, STATUS)  # an answer under way
        direct = await pair.site.join("direct")
        await trio.sleep(5)
        pair.site.partition(direct)
        await trio.sleep(2 * Config().heartbeat_timeout_s + Config().heartbeat_s)
        for presence in (pair.a, pair.b):
            assert pair.shown(presence)[:2] == ("relay", "online")
        await held.reset()


async def test_a_peer_that_is_gone_on_all_paths_is_noticed(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        relay = await pair.site.join("relay")
        direct = await pair.site.join("direct")
        await trio.sleep(5)
        async with pair.site.a.subscribe() as events:
            assert (await events.receive()).kind == "connected"
            for stream in (relay, direct):
                pair.site.partition(stream)
            with trio.fail_after(12):
                while (await events.receive()).kind != "disconnected":
                    pass


async def test_paths_that_come_and_go_leave_one_heartbeat_each_way(autojump_clock: Clock) -> None:
    chance = random.Random(5)
    async with open_pair() as pair:
        await pair.site.join("relay")
        for _ in range(30):
            await trio.sleep(chance.random() * 2)
            stream = await pair.site.join(chance.choice(["punched-udp", "punched-tcp", "direct"]))
            await trio.sleep(chance.random() * 2)
            if chance.random() < 0.5:
                stream.close()
            await trio.sleep(0.05)
            if not pair.site.a.connections():
                await pair.site.join("relay")
        await trio.sleep(10 * limits.LINK_IDLE_S)
        assert pair.shown(pair.a)[1] == pair.shown(pair.b)[1] == "online"
        assert pair.site.a.streams(pair.site.b.peer_id) == pair.site.b.streams(pair.site.a.peer_id) == 2


async def test_a_connection_through_a_port_mapping_is_shown_as_mapped(autojump_clock: Clock) -> None:
    for state in ("mapped", "private"):
        async with open_pair(state) as pair:
            await pair.site.join("direct", a_leads=False)  # to MAPPED
            await trio.sleep(5)
            assert pair.shown(pair.b)[0] == "mapped"  # as the peer says
            assert pair.shown(pair.a)[0] == ("mapped" if state == "mapped" else "direct")
