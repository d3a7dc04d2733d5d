"""Who is there: dials whom discovery names, follows connections, and beats with neighbours. Owns one core.peers.PeerTable.

Tasks: one that runs discovery (services.ladder), one for sightings, one that dials, one for our own status
(services.own_status), one that reviews whom to keep, and for each connected peer one that beats (services.heartbeat). At the
end every neighbour is told at once that we leave.
Not here: what a status says (the ``describe`` that is passed in), whom to dial when (core.peers), who is worth keeping
(core.neighbours), who tells whom what (core.gossip).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import msgspec
import trio

from meshmax.base.config import Config
from meshmax.base.errors import MeshmaxError, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.reachability import ReachState
from meshmax.base.status import PeerStatus, PeerView
from meshmax.core.backoff import Random
from meshmax.core.clones import Clones
from meshmax.core.gossip import Gossip
from meshmax.core.peer_entry import cause_of
from meshmax.core.peers import Dial, PeerEntry, PeerTable, Refusal
from meshmax.core.sequence import StatusSequence
from meshmax.core.told_path import told_path
from meshmax.ports import CountsStreams, Discovery, Sighting, Signer, Swarm
from meshmax.services.heartbeat import BEAT_PACE_S, FAREWELL_S, MAX_STATUS_STREAMS, Heartbeat
from meshmax.services.own_status import Keep, OwnStatus
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import CONNECTIONS
from meshmax.wire.protocols import STATUS

DIAL_DEADLINE_S: Final = 5.0  # a LAN answers in milliseconds; a peer that needs longer is tried again later
PATIENCE_S: Final = 1.5  # of these, once the peer is said to be at other addresses: these are dialled then
SIGHTINGS_WAITING: Final = 256  # rungs repeat themselves, so what does not fit is not lost
STATUS_STREAMS: Final = 2  # open with each neighbour all the time: its heartbeat and ours
LISTS: Final = frozenset({"cached", "rendezvous", "dht"})  # sources that remember peers, and hear none of them now
REVIEW_S: Final = 5.0  # between two looks at whom to keep; as quick as a peer in use has to be noticed

__all__ = ["BEAT_PACE_S", "MAX_STATUS_STREAMS", "PresenceService", "open_presence"]

_log = get_logger("presence")

Connect = Callable[
    [PeerId, Sequence[str]], Awaitable[None]
]  # raises ConnectError, NotAMember; deadlines are the caller's


class PresenceService:
    """Satisfies ports.Presence; made by `open_presence`."""

    def __init__(
        self,
        swarm: Swarm,
        signer: Signer,
        config: Config,
        describe: Callable[[], PeerStatus],
        unix_now: Callable[[], float],
        random: Random,
        sequence: StatusSequence | None = None,
        keep: Keep | None = None,
        connect: Connect | None = None,
        stand: Callable[[], ReachState] = lambda: "unknown",
        on_silent: Callable[[PeerId], None] = lambda peer_id: None,
        on_told: Callable[[PeerId, Sequence[str]], None] = lambda peer_id, addresses: None,
    ) -> None:
        self._swarm = swarm
        self._connect, self._stand, self._on_told = connect, stand, on_told
        self._signer = signer
        self._config = config
        self._unix_now = unix_now
        self._table = PeerTable(signer.peer_id, config.max_peers, random)
        instance = f"{int(random.random() * (1 << 48)):012x}"
        self._clones = Clones(instance)
        self._gossip = Gossip(signer.peer_id, self._table, self._clones)
        sequence = sequence or StatusSequence()
        self.own = OwnStatus(swarm, signer, describe, unix_now, instance, sequence, keep, self._gossip, self._clones)
        self.heartbeat = Heartbeat(
            swarm, config, self._table, self._gossip, self._clones, self.own, self._on_news, on_silent
        )
        self._dial_soon = trio.Event()
        self._dials: dict[PeerId, trio.CancelScope] = {}  # under way
        self._watchers: set[Callable[[], None]] = set()

    # --- ports.Presence ----------------------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerView, ...]:
        """Ourselves first, then online peers by round trip, then those that were lost seconds ago."""
        entries, stand = self._table.shown(trio.current_time()), self._stand()
        return (self._self_view(), *(self._view(entry, stand) for entry in entries))

    def view(self, peer_id: PeerId) -> PeerView | None:
        """One peer, ourselves too, also one that is not in `peers` any more; None if unknown."""
        if peer_id == self._signer.peer_id:
            return self._self_view()
        entry = self._table.entry(peer_id)
        return self._view(entry) if entry else None

    # --- for faces and the doctor -------------------------------------------------------------------------------------

    @property
    def problem(self) -> str:
        """What a person should know of this peer's identity, a sentence; '' when all is well."""
        now = trio.current_time()
        if own := self._clones.problem(now):
            return own
        names = [self._name(peer_id) for peer_id in self._clones.copied(now)]
        if not names:
            return ""
        return (
            f"two machines run with the identity of {', '.join(names)}: a home was copied; start one with a new --home"
        )

    def refused(self) -> tuple[Refusal, ...]:
        """Peers that take us for none of their mesh: where, why, when (monotonic seconds)."""
        return self._table.refused()

    def why_not(self, peer_id: PeerId, address: str) -> str:
        """Why the last dial did not reach the peer at that address; '' where it is connected or was not dialled."""
        entry = self._table.entry(peer_id)
        return cause_of(entry, address) if entry else ""

    # --- for meshmax.node -------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """What our status tells (models, load, draining) has changed; it is issued anew soon. Cheap; call it freely."""
        self.own.changed()

    def on_network_change(self) -> None:
        """Our addresses are others, or a cable is back: say so, and dial soon whom we could not reach before."""
        self._table.on_network_change(trio.current_time())
        for peer_id in self._dials:
            self._hasten(peer_id)
        self._dial_soon.set()
        self.own.changed()

    def on_mesh_change(self) -> None:
        """We are of another mesh now, and every connection was cut: nothing that was known of peers counts."""
        self._table.clear()
        dials, self._dials = self._dials, {}
        for scope in dials.values():  # what comes of them is of the former mesh, and says nothing of this one
            scope.cancel()
        self.own.issue()  # now: as long as ours names the former mesh, we dismiss the statuses of the new one
        self._dial_soon.set()
        self._tell()

    def lost(self) -> tuple[PeerView, ...]:
        """Peers that are gone, as they were last known, also those that `peers` shows no more: for an hour at most."""
        return tuple(_with_had(self._view(entry), entry) for entry in self._table.lost(trio.current_time()))

    def on_sighting(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """A person has just named this peer, as with a ticket."""
        self._table.on_sighting(peer_id, addresses, trio.current_time(), asked=True)
        self._hasten(peer_id)
        self._dial_soon.set()

    def farther(self) -> tuple[PeerView, ...]:
        """Peers that are no neighbours, as others tell of them, with addresses: hearsay until they are connected."""
        return tuple(self._view(entry) for entry in self._table.entries() if _is_farther(entry))

    def addresses_of(self, peer_id: PeerId) -> tuple[str, ...]:
        """Where anybody said that the peer is; () if nobody did."""
        entry = self._table.entry(peer_id)
        return entry.addresses if entry else ()

    def watch(self, on_news: Callable[[], None]) -> None:
        """Call ``on_news`` whenever a peer comes, goes or says something new."""
        self._watchers.add(on_news)

    def _on_news(self) -> None:
        self._dial_soon.set()
        self._tell()

    def _tell(self) -> None:
        for on_news in self._watchers:
            on_news()

    # --- connections -------------------------------------------------------------------------------------------------

    async def run_connections(self, nursery: trio.Nursery) -> None:
        """Follow the swarm's events; beat with whoever is connected."""
        async with self._swarm.subscribe() as events:
            async for event in events:
                if event.kind == "connected":
                    self._on_connected(event.peer_id, nursery)
                elif event.kind == "moved":
                    self._on_moved(event.peer_id)
                else:
                    self._table.on_disconnected(event.peer_id, trio.current_time())
                    self._gossip.on_disconnected(event.peer_id)
                    _log.info("peer disconnected", peer=event.peer_id)
                    self.heartbeat.stop(event.peer_id)
                CONNECTIONS.set(len(self._swarm.connections()))
                self._on_news()

    def _on_connected(self, peer_id: PeerId, nursery: trio.Nursery) -> None:
        connection = self._swarm.connections().get(peer_id)
        address, path = (connection.address, connection.path) if connection else ("", "direct")
        chosen = connection is not None and connection.direction == "out"
        self._table.on_connected(peer_id, address, trio.current_time(), chosen, path)
        self._gossip.on_connected(peer_id)
        _log.info("peer connected", peer=peer_id, address=address, path=path)
        if not self.heartbeat.is_beating(peer_id):
            nursery.start_soon(isolate, "heartbeat", lambda: self.heartbeat.beat(peer_id))

    def _on_moved(self, peer_id: PeerId) -> None:
        if (connection := self._swarm.connections().get(peer_id)) is not None:
            self._table.on_moved(peer_id, connection.address, connection.path, connection.direction == "out")
            _log.info("peer moved", peer=peer_id, address=connection.address, path=connection.path)
            self.heartbeat.move(peer_id)

    async def run_dials(self, nursery: trio.Nursery) -> NoReturn:
        """Dial whom the table says, when it says so."""
        while True:
            for dial in self._table.tick(trio.current_time()):
                nursery.start_soon(self._dial, dial)
            deadline = self._table.deadline()
            with trio.CancelScope(deadline=deadline if deadline is not None else float("inf")):
                await self._dial_soon.wait()
            self._dial_soon = trio.Event()

    async def _dial(self, dial: Dial) -> None:
        why = "no answer in time"
        refused = False
        attempts: tuple[tuple[str, str, str], ...] = ()
        with trio.move_on_after(DIAL_DEADLINE_S) as scope:
            self._dials[dial.peer_id] = scope
            try:
                await (self._connect or self._swarm.dial)(dial.peer_id, dial.addresses)
            except NotAMember as error:
                why, refused = error.message, True
            except MeshmaxError as error:
                why, attempts = error.message, getattr(error, "attempts", ())
            else:
                if connection := self._swarm.connections().get(dial.peer_id):
                    now = trio.current_time()
                    chosen = connection.direction == "out"
                    self._table.on_connected(dial.peer_id, connection.address, now, chosen, connection.path)
                    self._dialled(dial, scope)
                    return
        if not self._dialled(dial, scope):
            return  # the table waits for another one
        entry = self._table.entry(dial.peer_id)
        # Once for people, who may have given the address; what follows is only the same again.
        # Refusals are told where they are made (net.admission).
        log = _log.info if entry and not entry.failures and not refused else _log.debug
        log("dial failed", peer=dial.peer_id, why=why)
        now = trio.current_time()
        if refused:
            self._table.on_refused(dial.peer_id, dial.addresses[0], why, now)
        else:
            self._table.on_dial_failed(dial.peer_id, now, why, attempts)
        self._dial_soon.set()

    def _dialled(self, dial: Dial, scope: trio.CancelScope) -> bool:
        """A dial is over; False where its end says nothing any more.

        Our mesh may be another, or another dial to the same peer may have begun, where that came to us meanwhile and went again.
        """
        if self._dials.get(dial.peer_id) is not scope:
            return False
        del self._dials[dial.peer_id]
        return True

    def _hasten(self, peer_id: PeerId) -> None:
        """A dial that is under way at older addresses than those just told has not all its time any more."""
        entry, scope = self._table.entry(peer_id), self._dials.get(peer_id)
        if entry and entry.news and scope:
            scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE_S)
            self._on_told(peer_id, entry.addresses)

    async def run_review(self) -> NoReturn:
        """Look now and then who is in use, whom to let go and whom to try instead, and whether an identity is copied."""
        problem = ""
        while True:
            await trio.sleep(REVIEW_S)
            now = trio.current_time()
            if isinstance(self._swarm, CountsStreams):
                for peer_id in self._swarm.connections():
                    if self._swarm.streams(peer_id) > STATUS_STREAMS:
                        self._table.on_used(peer_id, now)
            for peer_id in self._table.review(now):
                self.heartbeat.part(peer_id)
            self._dial_soon.set()
            self._tell()  # who was lost is shown no more
            if self.problem != problem:
                problem = self.problem
                (_log.warning if problem else _log.info)("copied identities", problem=problem or "none any more")
                self.own.changed(force=True)  # so that the other one sees that we are no memory of its former self

    # --- discovery ---------------------------------------------------------------------------------------------------

    async def run_sightings(self, found: trio.MemoryReceiveChannel[Sighting]) -> None:
        """Let the table know whom the rungs see."""
        async for sighting in found:
            now = trio.current_time()
            if sighting.peer_id == self._signer.peer_id:
                self._clones.on_own_sighting(sighting.addresses, now)
                continue
            source = sighting.source
            self._table.on_sighting(
                sighting.peer_id,
                sighting.addresses,
                now,
                hearsay=source == "gossip",
                asked=source == "static",
                named=source in LISTS,
            )
            self._hasten(sighting.peer_id)
            self._dial_soon.set()

    # --- views -------------------------------------------------------------------------------------------------------

    def _name(self, peer_id: PeerId) -> str:
        view = self.view(peer_id)
        return view.status.name if view and view.status else peer_id

    def _self_view(self) -> PeerView:
        now = self._unix_now()
        return PeerView(self._signer.peer_id, "self", "self", self.own.status, rtt_s=0.0, last_seen_s=now)

    def _view(self, entry: PeerEntry, stand: ReachState | None = None) -> PeerView:
        """``stand``: how we stand, for who makes many."""
        draining = entry.status is not None and entry.status.draining
        gone = not entry.connected or entry.leaving
        state = "offline" if gone else "draining" if draining else "online"
        seen_at = entry.last_sign_at if entry.alive_at is None else entry.alive_at
        seen_s = self._unix_now() - (trio.current_time() - seen_at)
        mapped = entry.status.mapped if entry.status else ()
        path = told_path(entry.path, entry.address, entry.dialled, mapped, stand or self._stand())
        return PeerView(entry.peer_id, state, path, entry.status, entry.address, entry.rtt_s, seen_s)  # type: ignore[arg-type]


def _with_had(view: PeerView, entry: PeerEntry) -> PeerView:
    """``view`` with the models that the peer had before it said farewell."""
    if view.status is None or not view.status.leaving:
        return view
    return msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, models=entry.had))


def _is_farther(entry: PeerEntry) -> bool:
    """Whether a neighbour vouches for it and brought its status, and it may be dialled."""
    if entry.status is None or entry.connected or entry.leaving or entry.refusal:
        return False
    return bool(entry.tellers and entry.addresses)


@asynccontextmanager
async def open_presence(
    swarm: Swarm,
    signer: Signer,
    config: Config,
    describe: Callable[[], PeerStatus],
    discovery: Discovery,
    unix_now: Callable[[], float],
    random: Random,
    sequence: StatusSequence | None = None,
    keep: Keep | None = None,
    connect: Connect | None = None,
    stand: Callable[[], ReachState] = lambda: "unknown",
    on_silent: Callable[[PeerId], None] = lambda peer_id: None,
    on_told: Callable[[PeerId, Sequence[str]], None] = lambda peer_id, addresses: None,
) -> AsyncIterator[PresenceService]:
    """Presence, running. ``describe`` says what our status tells now; it is called in the event loop and must be quick.

    ``discovery`` names peers: a services.ladder. ``sequence`` goes on where this peer was before it was started anew; ``keep``
    writes down how far it may come. ``connect``: how peers are connected to, if not by dialling alone (services.connector).
    ``stand``: where we stand now; cheap. ``on_silent``: a connected peer lets us wait longer than it should. ``on_told``: a
    peer is said to be at these addresses, while it is dialled at others.
    """
    presence = PresenceService(
        swarm, signer, config, describe, unix_now, random, sequence, keep, connect, stand, on_silent, on_told
    )
    await presence.own.reserve()
    swarm.serve(STATUS, presence.heartbeat.answer)
    send, receive = trio.open_memory_channel[Sighting](SIGHTINGS_WAITING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(presence.own.run)
        nursery.start_soon(presence.run_connections, nursery)
        nursery.start_soon(presence.run_dials, nursery)
        nursery.start_soon(presence.run_sightings, receive)
        nursery.start_soon(presence.run_review)
        nursery.start_soon(discovery.run, send)
        try:
            yield presence
        finally:
            with trio.CancelScope(deadline=trio.current_time() + FAREWELL_S, shield=True):
                await presence.heartbeat.farewell()
            nursery.cancel_scope.cancel()
