"""Connecting by every way, and better paths: real swarms on a simulated cable, relays and punching as a test says."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from meshmax.base.errors import ConnectError, MeshmaxError, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES, Path
from meshmax.base.traversal import PathRecord
from meshmax.core.dial_plan import RELAY_S, Own
from meshmax.core.path_memory import PathMemory, fingerprint
from meshmax.core.upgrades import JITTER, PAUSES_S, YIELD_S
from meshmax.net.swarm import LibrarySwarm
from meshmax.ports import ByteStream
from meshmax.services.connector import MAX_WAYS, UPGRADE_DIAL_S, WRITE_PAUSE_S, Connector, Ways, open_connector
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import SimNetwork

Clock = trio.testing.MockClock
RELAY = SeededSigner(50).peer_id
RELAY_ADDRESS = f"/ip4/203.0.113.1/tcp/11435/p2p/{RELAY}/p2p-circuit"
NETWORK = fingerprint(["10.0.0.0/8"], [])
STARTED_AT_S = 1_700_000_000.0


class Ground:
    """Two peers, the first with a connector; ``relays`` and ``signals`` are those of the first."""

    def __init__(self, network: SimNetwork, a: LibrarySwarm, b: LibrarySwarm) -> None:
        self.network, self.a, self.b = network, a, b
        self.relays: Relays | None = Relays(self)
        self.signals: Signals | None = Signals(self)
        self.wanted = True
        self.outside: tuple[str, ...] = ()
        self.own_relays: tuple[PeerId, ...] = ()
        self.told: tuple[str, ...] = b.addresses
        self.kept: list[tuple[PathRecord, ...]] = []
        self.connector: Connector

    @property
    def circuit(self) -> str:
        return f"{RELAY_ADDRESS}/p2p/{self.b.peer_id}"

    async def pair(self) -> tuple[ByteStream, ByteStream]:
        near, far = self.network.wires.attach(), self.network.wires.attach()
        listener = await far.listen(far.ip, 0)
        leading = await near.connect(*listener.local)
        following = await listener.accept()
        listener.close()
        return leading, following

    async def meet(self, path: Path, address: str, lead: LibrarySwarm | None = None) -> None:
        leader, follower = (self.a, self.b) if lead is not self.b else (self.b, self.a)
        leading, following = await self.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(follower.adopt, following, leader.peer_id, "in", path, address))
            await leader.adopt(leading, follower.peer_id, "out", path, address)

    def apart(self) -> None:
        self.network.partition(self.a.peer_id, self.b.peer_id)

    def together(self) -> None:
        self.network.heal(self.a.peer_id, self.b.peer_id)

    def path(self) -> str:
        view = self.a.connections().get(self.b.peer_id)
        return view.path if view else ""

    def ways(self) -> Ways:
        async def keep(records: tuple[PathRecord, ...]) -> None:
            await trio.lowlevel.checkpoint()
            self.kept.append(records)

        return Ways(
            wanted=lambda: self.wanted,
            own=lambda: Own(
                self.a.peer_id,
                external_ips=self.outside,
                relays=self.own_relays,
                circuits=(RELAY_ADDRESS,) * bool(self.own_relays),
            ),
            network=lambda: NETWORK,
            relays=lambda: self.relays,
            signals=lambda: self.signals,
            addresses_of=lambda peer_id: self.told,
            name_of=lambda peer_id: "bootstrap-1" if peer_id == RELAY else "",
            keep=keep,
            unix_now=lambda: STARTED_AT_S + trio.current_time(),
            random=random.Random(1),
        )


class Relays:
    """Satisfies ports.Relays: a circuit takes 50 ms, or fails as the test says."""

    relays: tuple[PeerId, ...] = ()
    addresses: tuple[str, ...] = ()

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.asked: list[float] = []
        self.failure: MeshmaxError | None = None

    async def connect(self, peer_id: PeerId, relay: PeerId | str, *, guest: bool = False) -> None:
        self.asked.append(trio.current_time())
        await trio.sleep(0.05)
        if self.failure is not None:
            raise self.failure
        await self._ground.meet("relay", RELAY_ADDRESS)

    def watch(self, on_change: Callable[[], None]) -> None:
        pass


class Signals:
    """Satisfies ports.Signals: an attempt takes 2 s and fails, or makes a path in ``works_s``."""

    on_lane_stream: Callable[[ByteStream], Awaitable[None]] | None = None

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.tried: list[float] = []
        self.works_s: float | None = None

    async def traverse(self, peer_id: PeerId) -> Path:
        self.tried.append(trio.current_time())
        await trio.sleep(2.0 if self.works_s is None else self.works_s)
        if self.works_s is None:
            raise ConnectError("no better path", [("198.51.100.1:5000", "punch-tcp", "no answer")])
        await self._ground.meet("punched-tcp", "/ip4/198.51.100.1/tcp/5000")
        return "punched-tcp"

    async def open_lane_stream(self, peer_id: PeerId) -> ByteStream:
        await trio.lowlevel.checkpoint()
        raise ConnectError("no lanes here")


@asynccontextmanager
async def ground(kept: Sequence[PathRecord] = ()) -> AsyncIterator[Ground]:
    network = SimNetwork()
    async with (
        network.open_swarm(SeededSigner(1).private_bytes) as a,
        network.open_swarm(SeededSigner(2).private_bytes) as b,
    ):
        found = Ground(network, a, b)
        async with open_connector(a, found.ways(), PathMemory(kept, STARTED_AT_S)) as found.connector:
            yield found


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)


async def test_where_a_direct_path_works_no_relay_is_asked(autojump_clock: Clock) -> None:
    async with ground() as g:
        await g.connector.connect(g.b.peer_id, [g.circuit, *g.b.addresses])
        await until(lambda: g.connector.path_of(g.b.peer_id) is not None)
        assert (g.path(), g.relays and g.relays.asked) == ("direct", [])
        story = g.connector.path_of(g.b.peer_id)
        assert story is not None
        assert story.via.startswith("direct after 0.0")
        assert story.connect_ms == story.direct_ms
        assert story.connect_ms


async def test_where_it_does_not_answer_a_relay_is_a_moment_behind_it(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        began = trio.current_time()
        await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert g.path() == "relay"
        assert g.relays
        assert g.relays.asked == [pytest.approx(began + RELAY_S)]
        assert trio.current_time() - began < 0.5
        await until(lambda: g.connector.path_of(g.b.peer_id) is not None)
        story = g.connector.path_of(g.b.peer_id)
        assert story is not None
        assert story.via.startswith("relay bootstrap-1 after 0.")
        assert story.direct_ms is None


async def test_where_a_direct_path_never_worked_from_here_the_relay_is_asked_at_once(autojump_clock: Clock) -> None:
    async with ground([PathRecord(SeededSigner(2).peer_id, NETWORK, "punched-tcp", "", STARTED_AT_S - 5)]) as g:
        g.apart()
        began = trio.current_time()
        await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert g.relays
        assert g.relays.asked == [pytest.approx(began, abs=0.01)]


async def test_that_the_peer_takes_us_for_no_member_counts_more_than_that_others_ways_fail(
    autojump_clock: Clock,
) -> None:
    async with ground() as g:
        g.apart()
        assert g.relays
        g.relays.failure = NotAMember("another mesh")
        began = trio.current_time()
        with pytest.raises(NotAMember, match="another mesh"):
            await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert trio.current_time() - began < 1


async def test_every_way_that_failed_is_told(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        assert g.relays
        g.relays.failure = ConnectError("the relay is full")
        with pytest.raises(ConnectError) as caught:
            await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert {address for address, _, _ in caught.value.attempts} == {*g.b.addresses, g.circuit}
        with pytest.raises(ConnectError, match="no address"):
            await g.connector.connect(g.b.peer_id, [])


async def test_a_peer_that_comes_to_us_meanwhile_ends_the_dial(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        g.relays = None
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(g.connector.connect, g.b.peer_id, g.b.addresses)
            await trio.sleep(0.3)
            await g.meet("relay", RELAY_ADDRESS, lead=g.b)
        assert trio.current_time() - began < 1.0
        await until(lambda: g.connector.path_of(g.b.peer_id) is not None)
        story = g.connector.path_of(g.b.peer_id)
        assert story is not None
        assert story.via == "it came to us: relay bootstrap-1"


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("at_s", [0.001, 0.01, 0.1, 1.0, 3.9])
async def test_at_whatever_moment_of_a_dial_a_relay_is_known_the_peer_is_met_over_it_at_once(
    at_s: float, told: bool, autojump_clock: Clock
) -> None:
    async with ground() as g:
        g.apart()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(g.connector.connect, g.b.peer_id, g.b.addresses)
            await trio.sleep(at_s)
            if told:
                g.connector.on_told(g.b.peer_id, [g.circuit, *g.b.addresses])
                g.connector.on_told(g.b.peer_id, [g.circuit])
            else:
                g.own_relays = (RELAY,)
                g.connector.on_relays()
                g.connector.on_relays()
        assert g.path() == "relay"
        assert trio.current_time() - began <= at_s + RELAY_S + 0.2
        assert g.relays
        assert len(g.relays.asked) == 1


async def test_a_relay_that_is_known_too_late_or_leads_nowhere_ends_no_dial(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.connector.on_told(g.b.peer_id, [g.circuit])  # nobody is dialled
        g.apart()
        assert g.relays
        g.relays.failure = ConnectError("no place there")
        failures: list[ConnectError] = []

        async def connect() -> None:
            try:
                await g.connector.connect(g.b.peer_id, g.b.addresses)
            except ConnectError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(1.0)
            for number in range(100):
                g.connector.on_told(g.b.peer_id, [f"/ip4/203.0.113.{number}/tcp/1/p2p/{RELAY}/p2p-circuit"])
        assert {address for address, _, _ in failures[0].attempts} > set(g.b.addresses)
        assert len(g.relays.asked) < MAX_WAYS
        g.connector.on_told(g.b.peer_id, [g.circuit])


async def test_a_dial_that_is_given_up_leaves_nothing_behind(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        for after_s in (0.01, 0.1, 0.16, 0.21, 0.3):
            relays, g.relays = g.relays, None
            with trio.move_on_after(after_s):
                await g.connector.connect(g.b.peer_id, g.b.addresses)
            g.relays = relays
        await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert g.path() == "relay"


async def test_two_who_want_the_same_peer_dial_it_once(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(g.connector.connect, g.b.peer_id, [*g.b.addresses, g.circuit])
        assert g.relays
        assert len(g.relays.asked) == 1


async def test_while_a_relay_carries_better_paths_are_tried_with_longer_and_longer_pauses(
    autojump_clock: Clock,
) -> None:
    async with ground() as g:
        g.apart()
        g.told = ()
        await g.connector.connect(g.b.peer_id, [g.circuit])
        assert g.signals
        await trio.sleep(1000)
        waits = [later - earlier - 2.0 for earlier, later in zip(g.signals.tried, g.signals.tried[1:], strict=False)]
        assert len(waits) >= len(PAUSES_S) - 1
        for pause_s, waited_s in zip(PAUSES_S, waits, strict=False):
            assert (1 - JITTER) * pause_s - 0.1 <= waited_s <= (1 + JITTER) * pause_s + 0.1
        before = len(g.signals.tried)
        g.connector.on_network_change()
        await trio.sleep(1.5)
        assert len(g.signals.tried) == before + 1
        await trio.sleep(10)
        g.told = (f"/ip4/10.9.9.9/tcp/1/p2p/{g.b.peer_id}",)
        before = len(g.signals.tried)
        g.connector.on_news()  # the first that we hear of
        g.told = (f"/ip4/10.9.9.8/tcp/1/p2p/{g.b.peer_id}",)
        g.connector.on_news()
        await trio.sleep(1.5)
        assert len(g.signals.tried) == before + 1


async def test_when_others_see_us_elsewhere_a_better_path_is_tried_at_once(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        g.told = ()
        await g.connector.connect(g.b.peer_id, [g.circuit])
        assert g.signals
        await trio.sleep(300)
        before = len(g.signals.tried)
        seen: list[tuple[tuple[str, ...], int]] = [
            (("198.51.100.1",), 1),
            (("198.51.100.1",), 0),
            ((), 0),
            (("198.51.100.1",), 0),
            (("198.51.100.7",), 1),
        ]
        for outside, more in seen:
            g.outside = outside
            assert g.connector.on_whereabouts() == (outside == ("198.51.100.7",))  # else no attempt went by others
            await trio.sleep(1.5)
            assert len(g.signals.tried) == before + more
            await trio.sleep(200)
            before = len(g.signals.tried)


async def test_addresses_that_do_not_answer_do_not_delay_the_next_attempt(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        await g.connector.connect(g.b.peer_id, [g.circuit, *g.b.addresses])
        await until(lambda: g.signals is not None and len(g.signals.tried) == 2)
        assert g.signals
        first, second = g.signals.tried
        assert second - first <= UPGRADE_DIAL_S + PAUSES_S[0] * (1 + JITTER) + 0.1


async def test_a_silent_connection_gets_a_relayed_one_beside_it_and_is_left_if_it_is_dead(
    autojump_clock: Clock,
) -> None:
    async with ground() as g:
        g.told = (g.circuit, *g.b.addresses)
        await g.connector.connect(g.b.peer_id, g.b.addresses)
        await trio.sleep(60)
        assert g.relays
        for _ in range(20):  # it is only slow
            g.connector.on_silent(g.b.peer_id)
            await trio.sleep(1.0)
        assert (len(g.relays.asked), g.path()) == (1, "direct")
        await trio.sleep(60)
        g.apart()
        began = trio.current_time()
        g.connector.on_silent(g.b.peer_id)
        await until(lambda: g.path() == "relay")
        assert trio.current_time() - began < 1.5


async def test_the_side_that_did_not_dial_waits_for_the_other_to_begin(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        began = trio.current_time()
        await g.meet("relay", RELAY_ADDRESS, lead=g.b)
        await trio.sleep(YIELD_S + 1)
        assert g.signals
        assert len(g.signals.tried) == 1
        assert g.signals.tried[0] - began >= YIELD_S


async def test_a_better_path_ends_the_attempts_and_is_told(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        assert g.signals
        g.signals.works_s = 0.1
        await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        await until(lambda: g.path() == "punched-tcp")
        await trio.sleep(1000)
        assert len(g.signals.tried) == 1
        story = g.connector.path_of(g.b.peer_id)
        assert story is not None
        assert ", then TCP simultaneous open after 0." in story.via
        assert story.connect_ms
        assert story.direct_ms
        assert story.connect_ms < story.direct_ms < 1000


async def test_an_address_that_begins_to_work_is_used_although_nothing_can_be_signalled(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.apart()
        g.signals = None
        await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        assert g.path() == "relay"
        g.together()
        await until(lambda: g.path() == "direct", 120)


async def test_what_worked_is_written_down_and_tried_first(autojump_clock: Clock) -> None:
    async with ground() as g:
        await g.connector.connect(g.b.peer_id, g.b.addresses)
        await trio.sleep(WRITE_PAUSE_S + 1)
        [records] = g.kept
        assert [(each.peer_id, each.path, each.address) for each in records] == [
            (g.b.peer_id, "direct", g.b.addresses[0])
        ]
        await g.a.disconnect(g.b.peer_id)
        await until(lambda: not g.a.connections())
        await g.connector.connect(g.b.peer_id, [f"/ip4/10.9.9.9/tcp/1/p2p/{g.b.peer_id}"])
        assert g.path() == "direct"


async def test_an_endless_list_of_addresses_costs_no_more_than_a_long_one(autojump_clock: Clock) -> None:
    async with ground() as g:
        endless = [f"/ip4/10.9.{n >> 8}.{n & 255}/tcp/1/p2p/{g.b.peer_id}" for n in range(20_000)]
        with pytest.raises(ConnectError) as caught:
            await g.connector.connect(g.b.peer_id, endless)
        assert len(caught.value.attempts) <= MAX_ADDRESSES


async def test_in_the_open_mesh_peers_are_just_dialled(autojump_clock: Clock) -> None:
    async with ground() as g:
        g.wanted = False
        g.apart()
        with pytest.raises(ConnectError):
            await g.connector.connect(g.b.peer_id, [*g.b.addresses, g.circuit])
        g.together()
        await g.connector.connect(g.b.peer_id, g.b.addresses)
        await trio.sleep(WRITE_PAUSE_S + 1)
        assert (g.path(), g.relays and g.relays.asked, g.kept) == ("direct", [], [])
