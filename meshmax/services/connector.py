"""Connects to members by every way there is, and looks for better paths while a peer is reached over a relay.

`connect` follows core.dial_plan: the first connection that is admitted counts, all other tries end. That the peer takes us for
no member, said on any way, ends it at once. A relay over which the peer may be reached, and that is known only when the dial is
under way, is tried at once. Behind it one task follows the swarm's events, one begins attempts at better paths
when core.upgrades says so (signalled over the connection that is there, and dialled directly, side by side), one writes down
what worked (core.path_memory). In the open mesh `connect` just dials. Not here: relays and punching themselves (`Relays`,
`Signals`), whom to connect to (services.presence).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.errors import ConnectError
from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.base.traversal import PathRecord, PathStory
from meshmax.core.backoff import Random
from meshmax.core.dial_plan import NEXT_RELAY_S, Own, Step, dial_plan, parse
from meshmax.core.path_memory import PathMemory
from meshmax.core.path_story import Story
from meshmax.core.upgrades import Upgrades
from meshmax.ports import ConnectionView, Relays, Signals, Swarm
from meshmax.services.race import Race, Way
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

UPGRADE_S: Final = 15.0  # for an attempt at a better path; each of its parts has a shorter deadline of its own
UPGRADE_DIAL_S: Final = (
    4.0  # of these for addresses: who is not there lets a dial wait for longer than signalling takes
)
BESIDE_S: Final = 5.0  # for a relayed connection beside one that is doubted
BESIDE_PAUSE_S: Final = 0.3
BESIDE_AGAIN_S: Final = 30.0  # before the same of the same peer: who is slow for long is not dead
MAX_WAYS: Final = 8  # of one dial: more relays are named by who wants to have us dial them
WRITE_PAUSE_S: Final = 5.0  # news of paths come many at a time
LAST_WRITE_S: Final = 2.0

_log = get_logger("connector")


@dataclass(frozen=True)
class Ways:
    """What a Connector goes by; everything is asked anew each time, since networks and meshes change."""

    wanted: Callable[[], bool]  # whether peers may be anywhere, not on our LAN only
    own: Callable[[], Own]
    network: Callable[[], str]  # core.path_memory.fingerprint
    relays: Callable[[], Relays | None]
    signals: Callable[[], Signals | None]
    addresses_of: Callable[[PeerId], Sequence[str]]  # what the peer tells of itself
    name_of: Callable[[PeerId], str]  # what people call a peer; '' where nobody knows
    keep: Callable[[tuple[PathRecord, ...]], Awaitable[None]]  # write it down; raises StoreError
    unix_now: Callable[[], float]
    random: Random


class Connector:
    """See the module; made by `open_connector`."""

    def __init__(self, swarm: Swarm, ways: Ways, memory: PathMemory, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._besides: dict[PeerId, float] = {}  # connected peers to whom another way was looked for -> when
        self._swarm, self._ways, self._memory = swarm, ways, memory
        self._upgrades = Upgrades(ways.random)
        self._stories: dict[PeerId, Story] = {}  # of connected peers
        self._told: dict[PeerId, tuple[str, ...]] = {}  # addresses of who is reached over a relay, by its own word
        self._given: dict[PeerId, tuple[str, ...]] = {}  # of the same: what they were dialled at
        self._dials: dict[PeerId, _Dial] = {}
        self._outside = frozenset[str]()  # our own IP addresses as others see them
        self._due = trio.Event()
        self._news = trio.Event()

    # --- what is -----------------------------------------------------------------------------------------------------

    def path_of(self, peer_id: PeerId) -> PathStory | None:
        """How the path to a connected peer came about; None where the peer is not connected."""
        story = self._stories.get(peer_id)
        return story.told if story else None

    # --- connecting --------------------------------------------------------------------------------------------------

    async def connect(self, peer_id: PeerId, addresses: Sequence[str], *, guest: bool = False) -> None:
        """Connect to a member that is said to be at ``addresses``; returns at once if connected.

        ``guest`` as in `Swarm.dial`. Raises ConnectError with every attempt, NotAMember. Deadlines are the caller's.
        """
        while (dial := self._dials.get(peer_id)) is not None and peer_id not in self._swarm.connections():
            await dial.over.wait()
        if peer_id in self._swarm.connections() or not (guest or self._ways.wanted()):
            await self._swarm.dial(peer_id, addresses, guest=guest)
            return
        dial = self._dials[peer_id] = _Dial(trio.current_time(), tuple(addresses[:MAX_ADDRESSES]), guest)
        try:
            ways = self._ways_of(peer_id, self._plan(peer_id, addresses), guest)
            dial.tried.update(way.name for way in ways)
            await self._race(ways, dial.arrived, dial.race)
        finally:
            if self._dials.get(peer_id) is dial:
                del self._dials[peer_id]
            dial.over.set()

    def _plan(self, peer_id: PeerId, addresses: Sequence[str]) -> tuple[Step, ...]:
        own, network, now_s = self._ways.own(), self._ways.network(), self._ways.unix_now()
        worked = self._memory.worked(peer_id, network, now_s)
        return dial_plan(peer_id, addresses, own, worked, self._memory.directless(peer_id, network, now_s))

    def _ways_of(self, peer_id: PeerId, plan: Sequence[Step], guest: bool = False, better: bool = False) -> list[Way]:
        """The dials of ``plan`` as one way, since they are raced by the swarm, and each relay as one."""
        direct = [(address, step.delay_s) for step in plan if step.method == "direct" for address in step.addresses]
        dial = partial(
            self._swarm.dial,
            peer_id,
            [address for address, _ in direct],
            guest=guest,
            delays_s=[delay_s for _, delay_s in direct],
            better=better,
        )
        found = [Way("direct", partial(_shortly, dial) if better else dial)] if direct else []
        if (relays := self._ways.relays()) is not None and not better:
            for step in plan:
                if step.method == "relay":
                    way = partial(relays.connect, peer_id, step.addresses[0], guest=guest)
                    found.append(Way(step.addresses[0], way, step.delay_s))
        return found

    # --- events ------------------------------------------------------------------------------------------------------

    async def run_events(self) -> None:
        """Follow the swarm until cancelled."""
        async with self._swarm.subscribe() as events:
            async for event in events:
                view = self._swarm.connections().get(event.peer_id)
                if event.kind == "disconnected" or view is None:
                    self._on_gone(event.peer_id)
                else:
                    self._on_path(view)

    def _on_path(self, view: ConnectionView) -> None:
        peer_id, now = view.peer_id, trio.current_time()
        relay = self._relay_name(view)
        story = self._stories.get(peer_id)
        if story is None:
            dial = self._dials.get(peer_id)
            self._stories[peer_id] = Story(
                view.path, relay, dial.began if dial and view.direction == "out" else None, now
            )
            if dial:
                self._given[peer_id] = dial.addresses
                dial.arrived.set()
        else:
            story.on_path(view.path, relay, now)
        if view.path == "relay":
            self._told.setdefault(peer_id, self._addresses_of(peer_id))
        else:
            self._forget_addresses(peer_id)
        if not self._ways.wanted():
            return
        dialled = view.direction == "out"
        self._upgrades.on_path(peer_id, view.path, dialled, now)
        direct = dialled and view.path in ("direct", "mapped")
        address = f"{view.address}/p2p/{peer_id}" if direct else ""
        if self._memory.on_path(peer_id, self._ways.network(), view.path, address, self._ways.unix_now()):
            self._news.set()
        self._due.set()

    def _on_gone(self, peer_id: PeerId) -> None:
        self._stories.pop(peer_id, None)
        self._besides.pop(peer_id, None)
        self._forget_addresses(peer_id)
        self._upgrades.on_gone(peer_id)

    def _forget_addresses(self, peer_id: PeerId) -> None:
        self._told.pop(peer_id, None)
        self._given.pop(peer_id, None)

    def _relay_name(self, view: ConnectionView) -> str:
        if view.path != "relay":
            return ""
        circuit = parse(f"{view.address.removesuffix('/p2p-circuit')}/p2p-circuit")
        name = self._ways.name_of(circuit.relay) if circuit.relay else ""
        return name if name and name.isascii() and name.isprintable() else circuit.host or "unknown"

    def on_network_change(self) -> None:
        """Our own network is another: attempts begin afresh. Cheap, called from any task."""
        self._upgrades.on_network_change(trio.current_time())
        self._due.set()

    def on_whereabouts(self) -> bool:
        """Others may see us at other addresses than before: better paths are tried afresh by these. Cheap.

        True where attempts that are under way went by others.
        """
        before, outside = self._outside, frozenset(self._ways.own().external_ips)
        self._outside = outside or before
        if outside <= before:
            return False
        self.on_network_change()
        return bool(before)

    def on_silent(self, peer_id: PeerId) -> None:
        """The connection to the peer may be dead: connect over a relay beside it; which one lives shows then (net.draining).

        Cheap, called from any task.
        """
        view, now = self._swarm.connections().get(peer_id), trio.current_time()
        again = now - self._besides.get(peer_id, float("-inf")) < BESIDE_AGAIN_S
        if view is not None and view.path != "relay" and self._ways.wanted() and not again:
            self._besides[peer_id] = now
            self._nursery.start_soon(isolate, "connection", partial(self._connect_beside, peer_id))

    async def _connect_beside(self, peer_id: PeerId) -> None:
        with trio.move_on_after(BESIDE_S):
            while (view := self._swarm.connections().get(peer_id)) is not None and view.path != "relay":
                plan = [step for step in self._plan(peer_id, self._addresses_of(peer_id)) if step.method == "relay"]
                try:
                    await self._race(self._ways_of(peer_id, plan))
                    return
                except ConnectError:  # connections to relays may have died with this one, and come back
                    await trio.sleep(BESIDE_PAUSE_S)

    def on_relays(self) -> None:
        """Other relays keep a place for us than before: who is dialled may have one there, too. Cheap, called from any task."""
        for peer_id, dial in self._dials.items():
            self._add_relays(peer_id, dial)

    def on_told(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """A peer is said to be at these addresses, while it is dialled at others perhaps. Cheap, called from any task."""
        if (dial := self._dials.get(peer_id)) is not None:
            dial.addresses = tuple(dict.fromkeys((*addresses, *dial.addresses)))[:MAX_ADDRESSES]
            self._add_relays(peer_id, dial)

    def _add_relays(self, peer_id: PeerId, dial: _Dial) -> None:
        if peer_id in self._swarm.connections():
            return
        for way in self._ways_of(peer_id, self._plan(peer_id, dial.addresses), dial.guest):
            if way.name != "direct" and way.name not in dial.tried and len(dial.tried) < MAX_WAYS:
                now = trio.current_time()
                dial.tried.add(way.name)
                dial.race.add(replace(way, delay_s=max(dial.next_relay - now, 0.0)))
                dial.next_relay = max(dial.next_relay, now) + NEXT_RELAY_S

    def on_news(self) -> None:
        """Peers may tell other addresses than before. Cheap, called from any task."""
        for peer_id, before in self._told.items():
            now_told = self._addresses_of(peer_id)
            if now_told != before:
                self._told[peer_id] = now_told
                if before:  # else these are the first that we hear of
                    self._upgrades.on_addresses(peer_id, trio.current_time())
                    self._due.set()

    def _addresses_of(self, peer_id: PeerId) -> tuple[str, ...]:
        return tuple(self._ways.addresses_of(peer_id)[:MAX_ADDRESSES])

    # --- better paths ------------------------------------------------------------------------------------------------

    async def run_upgrades(self) -> NoReturn:
        """Begin attempts when they are due."""
        while True:
            due = self._due
            for peer_id in self._upgrades.tick(trio.current_time()):
                self._nursery.start_soon(self._upgrade, peer_id)
            deadline = self._upgrades.deadline()
            with trio.CancelScope(deadline=float("inf") if deadline is None else deadline):
                await due.wait()
            if due.is_set():
                self._due = trio.Event()

    async def _upgrade(self, peer_id: PeerId) -> None:
        began = trio.current_time()
        try:
            with trio.move_on_after(UPGRADE_S):
                await isolate("upgrade", partial(self._try_better, peer_id))
        finally:
            _log.debug("a better path was tried", peer=peer_id, seconds=round(trio.current_time() - began, 2))
            self._upgrades.on_tried(peer_id, trio.current_time())
            self._due.set()

    async def _try_better(self, peer_id: PeerId) -> None:
        """Every way to a path without a relay, side by side. Raises ConnectError, NotAMember."""
        # Its status may not be there yet; what it was dialled at may be what others said.
        addresses = dict.fromkeys((*self._addresses_of(peer_id), *self._given.get(peer_id, ())))
        plan = self._plan(peer_id, tuple(addresses))
        found, signals = self._ways_of(peer_id, plan, better=True), self._ways.signals()
        if signals is not None:
            found.append(Way("signalled", partial(signals.traverse, peer_id)))
        await self._race(found)

    async def _race(self, ways: Sequence[Way], arrived: trio.Event | None = None, race: Race | None = None) -> None:
        if not ways:
            raise ConnectError("no address of the peer is known")
        await (race or Race()).run(ways, arrived)

    # --- memory ------------------------------------------------------------------------------------------------------

    async def run_memory(self) -> NoReturn:
        """Write down what worked, now and then and at the end."""
        try:
            while True:
                await self._news.wait()
                await trio.sleep(WRITE_PAUSE_S)
                await self._write()
        finally:
            if self._news.is_set():
                with trio.CancelScope(deadline=trio.current_time() + LAST_WRITE_S, shield=True):
                    await self._write()

    async def _write(self) -> None:
        self._news = trio.Event()
        await isolate("paths", partial(self._ways.keep, self._memory.snapshot()))


async def _shortly(dial: Callable[[], Awaitable[None]]) -> None:
    with trio.move_on_after(UPGRADE_DIAL_S):
        await dial()
        return
    raise ConnectError("no address answered in time")


class _Dial:
    """A `connect` under way."""

    def __init__(self, began: float, addresses: tuple[str, ...], guest: bool) -> None:
        self.began, self.addresses, self.guest = began, addresses, guest
        self.race = Race()
        self.tried: set[str] = set()  # ways, by name
        self.next_relay = began  # when one more that is known only then may be tried
        self.arrived = trio.Event()  # the peer is connected
        self.over = trio.Event()


@asynccontextmanager
async def open_connector(swarm: Swarm, ways: Ways, memory: PathMemory) -> AsyncIterator[Connector]:
    """A connector, running. ``memory``: what was kept from before."""
    async with trio.open_nursery() as nursery:
        connector = Connector(swarm, ways, memory, nursery)
        nursery.start_soon(connector.run_events)
        nursery.start_soon(connector.run_upgrades)
        nursery.start_soon(connector.run_memory)
        await trio.lowlevel.checkpoint()
        try:
            yield connector
        finally:
            nursery.cancel_scope.cancel()
