"""Who is there: dials whom discovery names, beats, and spreads statuses. Owns one core.peers.PeerTable.

Tasks: one that runs discovery (services.ladder), one for sightings, one that dials, one for our own status, and
for each connected peer one that beats. A connection on which no echo comes within ``heartbeat_timeout_s`` is cut (libp2p
by itself never notices a frozen process); one that the peer has opened since, as one that moves does, is beaten on
instead. Our own status is issued anew when something changed (at most once in STATUS_PAUSE_S) and every STATUS_REFRESH_S,
and sent at once; what we know of others goes along with regular beats.
Not here: what a status says (the ``describe`` that is passed in), whom to dial when (core.peers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn

import msgspec
import trio

from meshmax.base.config import Config
from meshmax.base.errors import ManifestInvalid, MeshmaxError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus, PeerView
from meshmax.core.backoff import Random
from meshmax.core.peers import Dial, PeerEntry, PeerTable
from meshmax.core.sequence import StatusSequence
from meshmax.ports import ConnectionView, Discovery, Sighting, Signer, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import CONNECTIONS
from meshmax.wire.protocols import STATUS
from meshmax.wire.signed import STATUS_DOMAIN, sign
from meshmax.wire.status import (
    BEAT,
    ECHO,
    MAX_STATUS_BYTES,
    MAX_STATUSES,
    Beat,
    Echo,
    check_statuses,
    fitted,
    read_status,
)

DIAL_DEADLINE_S: Final = 5.0  # a LAN answers in milliseconds; a peer that needs longer is tried again later
DIALS_AT_ONCE: Final = 16
SIGHTINGS_WAITING: Final = 256  # rungs repeat themselves, so what does not fit is not lost
STATUS_PAUSE_S: Final = 0.25  # load changes with every prompt; neighbours need it soon, not each time
STATUS_REFRESH_S: Final = 15.0
MAX_STATUS_STREAMS: Final = 4  # answered at once for one peer: one a connection, and those that are ending
BEAT_PACE_S: Final = 0.1  # after each answer: checking 64 signatures takes about 20 ms, and nobody honest beats faster
# What the other side may be silent for before we give its status stream up; it beats every heartbeat_s.
SILENCE_FACTOR: Final = 15.0

_log = get_logger("presence")
Keep = Callable[[int], Awaitable[None]]  # writes a bound of the sequence down


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
    ) -> None:
        self._swarm = swarm
        self._signer = signer
        self._config = config
        self._describe = describe
        self._unix_now = unix_now
        self._random = random
        self._table = PeerTable(signer.peer_id, config.max_peers, random)
        self._sequence, self._keep = sequence or StatusSequence(), keep
        self._own: tuple[PeerStatus, Signed] = self._issue()
        self._beats: dict[PeerId, trio.CancelScope] = {}
        self._answering: Counter[PeerId] = Counter()
        self._changed = trio.Event()  # something that our own status tells has changed
        self._reissued = trio.Event()  # our own status was issued anew: tell everybody now
        self._dial_soon = trio.Event()
        self._watchers: set[Callable[[], None]] = set()

    # --- ports.Presence ----------------------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerView, ...]:
        """Ourselves first, then online peers by round trip, then those that left within the last minute."""
        entries = self._table.shown(trio.current_time())
        return (self._self_view(), *(self._view(entry) for entry in entries))

    def view(self, peer_id: PeerId) -> PeerView | None:
        """One peer, ourselves too; None if unknown."""
        if peer_id == self._signer.peer_id:
            return self._self_view()
        entry = self._table.entry(peer_id)
        return self._view(entry) if entry else None

    # --- for meshmax.node -------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """What our status tells (models, load, draining) has changed; it is issued anew soon. Cheap; call it freely."""
        self._changed.set()

    def on_network_change(self) -> None:
        """Our addresses are others, or a cable is back: say so, and dial at once whom we could not reach before."""
        self._table.on_network_change(trio.current_time())
        self._dial_soon.set()
        self._changed.set()

    def watch(self, on_news: Callable[[], None]) -> None:
        """Call ``on_news`` whenever a peer comes, goes or says something new."""
        self._watchers.add(on_news)

    # --- status ------------------------------------------------------------------------------------------------------

    def _issue(self) -> tuple[PeerStatus, Signed]:
        """Our status, signed, with the next sequence."""
        status = msgspec.structs.replace(
            self._describe(),
            sequence=self._sequence.next(int(self._unix_now() * 1000)),
            issued_at_s=int(self._unix_now()),
            addresses=self._swarm.addresses,
        )
        status = fitted(status)
        return status, sign(STATUS_DOMAIN, status, self._signer.peer_id, self._signer.sign)

    async def reserve(self) -> None:
        """Keep how far our sequence may come, if it is time; a disk that takes it not is logged and costs no status."""
        bound = self._sequence.to_keep(int(self._unix_now() * 1000))
        if self._keep is not None and bound is not None and await isolate("sequence", partial(self._keep, bound)):
            self._sequence.kept(bound)

    async def run_status(self) -> NoReturn:
        """Issue our own status anew when it changed, and now and then."""
        while True:
            with trio.move_on_after(STATUS_REFRESH_S):
                await self._changed.wait()
            await self.reserve()
            self._changed = trio.Event()
            self._own = self._issue()
            reissued, self._reissued = self._reissued, trio.Event()
            reissued.set()
            await trio.sleep(STATUS_PAUSE_S)

    def _take(self, statuses: Sequence[Signed], bearer: PeerId) -> None:
        check_statuses(tuple(statuses))
        news = False
        for signed in statuses:
            if self._table.is_known(signed, bearer):
                continue  # most are: every neighbour brings the same ones
            try:
                status = read_status(signed)
            except ManifestInvalid as error:
                raise RemoteProtocolError(f"the peer sent a status that is not valid: {error.message}") from error
            if status.mesh == self._own[0].mesh:
                news |= self._table.on_status(status, signed, bearer, trio.current_time())
        if news:
            self._dial_soon.set()
            self._tell()

    def _tell(self) -> None:
        for on_news in self._watchers:
            on_news()

    # --- heartbeats --------------------------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """Serve the status protocol to one peer until it ends the stream or falls silent."""
        peer = stream.peer
        if self._answering[peer] >= MAX_STATUS_STREAMS:
            raise RemoteProtocolError(f"the peer keeps more than {MAX_STATUS_STREAMS} status streams open")
        self._answering[peer] += 1
        try:
            await self._answer_beats(FrameStream(stream))
        finally:
            self._answering[peer] -= 1
            if not self._answering[peer]:
                del self._answering[peer]

    async def _answer_beats(self, frames: FrameStream) -> None:
        while True:
            beat = None
            with trio.move_on_after(self._config.heartbeat_s * SILENCE_FACTOR):
                beat = await frames.try_receive(BEAT)
            if beat is None:  # it ended the stream, or beats no more; our own beats decide whether it lives
                return
            self._take(beat.statuses, frames.peer)
            news = self._table.news_for(frames.peer, MAX_STATUSES, MAX_STATUS_BYTES)
            await frames.send(ECHO, Echo(beat.nonce, tuple(news)))
            await trio.sleep(BEAT_PACE_S)

    async def _beat(self, peer_id: PeerId) -> None:
        """Beat until the peer's connections are gone; cut those on which it does not answer."""
        with trio.CancelScope() as scope:
            self._beats[peer_id] = scope
            try:
                while (connection := self._swarm.connections().get(peer_id)) is not None:
                    await self._beat_over(connection)
            finally:
                if self._beats.get(peer_id) is scope:
                    del self._beats[peer_id]

    async def _beat_over(self, connection: ConnectionView) -> None:
        """Beat on the peer's newest connection, which is this one, until it fails; then cut it and older ones."""
        peer_id = connection.peer_id
        try:
            with trio.fail_after(self._config.heartbeat_timeout_s):
                stream = await self._swarm.open_stream(peer_id, STATUS)
            try:
                await self._beat_on(FrameStream(stream), peer_id)
            finally:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        except (trio.TooSlowError, MeshmaxError) as error:
            why = error.message if isinstance(error, MeshmaxError) else "its heartbeat stopped"
            _log.info("connection lost", peer=peer_id, why=why)
            await self._swarm.disconnect(peer_id, connection)

    async def _beat_on(self, frames: FrameStream, peer_id: PeerId) -> None:
        nonce, told = 0, -1
        while True:
            status, signed = self._own
            own = [signed] if status.sequence > told else []
            room = MAX_STATUS_BYTES - sum(len(word.payload) for word in own)
            news = self._table.news_for(peer_id, MAX_STATUSES - 1, room)
            reissued = self._reissued
            started = trio.current_time()
            with trio.fail_after(self._config.heartbeat_timeout_s):
                await frames.send(BEAT, Beat(nonce, (*own, *news)))
                echo = await frames.receive(ECHO)
            if echo.nonce != nonce:
                raise RemoteProtocolError("the peer echoed another heartbeat than it was sent")
            now = trio.current_time()
            self._table.on_round_trip(peer_id, now - started, now)
            self._take(echo.statuses, peer_id)
            nonce, told = nonce + 1, status.sequence
            with trio.move_on_after(self._config.heartbeat_s):
                await reissued.wait()

    # --- connections -------------------------------------------------------------------------------------------------

    async def run_connections(self, nursery: trio.Nursery) -> None:
        """Follow the swarm's events; beat with whoever is connected."""
        async with self._swarm.subscribe() as events:
            async for event in events:
                now = trio.current_time()
                if event.kind == "connected":
                    connection = self._swarm.connections().get(event.peer_id)
                    self._table.on_connected(event.peer_id, connection.address if connection else "", now)
                    _log.info("peer connected", peer=event.peer_id, address=connection.address if connection else "")
                    if event.peer_id not in self._beats:
                        nursery.start_soon(isolate, "heartbeat", lambda peer_id=event.peer_id: self._beat(peer_id))
                else:
                    self._table.on_disconnected(event.peer_id, now)
                    _log.info("peer disconnected", peer=event.peer_id)
                    if scope := self._beats.pop(event.peer_id, None):
                        scope.cancel()
                CONNECTIONS.set(len(self._swarm.connections()))
                self._dial_soon.set()
                self._tell()

    async def run_dials(self, nursery: trio.Nursery) -> NoReturn:
        """Dial whom the table says, when it says so."""
        limiter = trio.CapacityLimiter(DIALS_AT_ONCE)
        while True:
            for dial in self._table.tick(trio.current_time()):
                nursery.start_soon(self._dial, dial, limiter)
            deadline = self._table.deadline()
            with trio.CancelScope(deadline=deadline if deadline is not None else float("inf")):
                await self._dial_soon.wait()
            self._dial_soon = trio.Event()

    async def _dial(self, dial: Dial, limiter: trio.CapacityLimiter) -> None:
        why = "no answer in time"
        async with limiter:
            with trio.move_on_after(DIAL_DEADLINE_S):
                try:
                    await self._swarm.dial(dial.peer_id, dial.addresses)
                except MeshmaxError as error:
                    why = error.message
                else:
                    connection = self._swarm.connections().get(dial.peer_id)
                    if connection:
                        self._table.on_connected(dial.peer_id, connection.address, trio.current_time())
                        return
        entry = self._table.entry(dial.peer_id)
        # Once for people, who may have given the address; what follows is only the same again.
        log = _log.info if entry and not entry.failures else _log.debug
        log("dial failed", peer=dial.peer_id, why=why)
        self._table.on_dial_failed(dial.peer_id, trio.current_time())
        self._dial_soon.set()

    # --- discovery ---------------------------------------------------------------------------------------------------

    async def run_sightings(self, found: trio.MemoryReceiveChannel[Sighting]) -> None:
        """Let the table know whom the rungs see."""
        async for sighting in found:
            hearsay = sighting.source == "gossip"
            self._table.on_sighting(sighting.peer_id, sighting.addresses, trio.current_time(), hearsay)
            self._dial_soon.set()

    # --- views -------------------------------------------------------------------------------------------------------

    def _self_view(self) -> PeerView:
        now = self._unix_now()
        return PeerView(self._signer.peer_id, "self", "self", self._own[0], rtt_s=0.0, last_seen_s=now)

    def _view(self, entry: PeerEntry) -> PeerView:
        draining = entry.status is not None and entry.status.draining
        state = "offline" if not entry.connected else "draining" if draining else "online"
        seen_s = self._unix_now() - (trio.current_time() - entry.last_sign_at)
        return PeerView(entry.peer_id, state, "direct", entry.status, entry.address, entry.rtt_s, seen_s)  # type: ignore[arg-type]


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
) -> AsyncIterator[PresenceService]:
    """Presence, running. ``describe`` says what our status tells now; it is called in the event loop and must be quick.

    ``discovery`` names peers: a services.ladder. ``sequence`` goes on where this peer was before it was started anew; ``keep``
    writes down how far it may come.
    """
    presence = PresenceService(swarm, signer, config, describe, unix_now, random, sequence, keep)
    await presence.reserve()
    swarm.serve(STATUS, presence.answer)
    send, receive = trio.open_memory_channel[Sighting](SIGHTINGS_WAITING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(presence.run_status)
        nursery.start_soon(presence.run_connections, nursery)
        nursery.start_soon(presence.run_dials, nursery)
        nursery.start_soon(presence.run_sightings, receive)
        nursery.start_soon(discovery.run, send)
        try:
            yield presence
        finally:
            nursery.cancel_scope.cancel()
