"""The status protocol with each neighbour: beats, answers, and what both carry. Moves words between streams and core.gossip.

A connection on which a beat is due and nothing at all comes for ``heartbeat_timeout_s`` is cut (core.liveness; libp2p by itself
never notices a frozen process); before that, after SILENT_S, its owner may look for another way to the peer.
Beats go over the best connection and move to a better one at once, so that the worse one empties. A beat goes out every
``heartbeat_s``, at once when our own status changed, and soon when a neighbour asked for something. Not here: who is a neighbour
(services.presence).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshmax.base.config import Config
from meshmax.base.errors import ManifestInvalid, MeshmaxError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus, vitals_of
from meshmax.core.clones import TELL_S, Clones
from meshmax.core.gossip import Gossip
from meshmax.core.liveness import Silence
from meshmax.core.peers import PeerTable
from meshmax.ports import ConnectionView, HearsPeers, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.own_status import OwnStatus
from meshmax.telemetry.log import get_logger
from meshmax.wire.protocols import STATUS
from meshmax.wire.status import (
    BEAT,
    ECHO,
    MAX_STATUS_BYTES,
    MAX_STATUSES,
    Beat,
    Echo,
    Parting,
    check_statuses,
    check_vitals,
    pack_notices,
    read_notices,
    read_status,
    read_wants,
)

SAME_SIGNER: Final = 2  # statuses of one peer looked at in a message: those of two copies of it
MAX_STATUS_STREAMS: Final = 4  # answered at once for one peer: one a connection, and those that are ending
BEAT_PACE_S: Final = 0.1  # after each answer: checking 64 signatures takes about 20 ms, and nobody honest beats faster
# What the other side may be silent for before we give its status stream up; it beats every heartbeat_s.
SILENCE_FACTOR: Final = 15.0
SILENT_S: Final = 1.0  # of silence, or SILENT_ROUND_TRIPS if these are longer, until the connection is doubted
SILENT_ROUND_TRIPS: Final = 4
FAREWELL_S: Final = 0.3  # for our last word to reach all neighbours; who misses it notices the end of the connection

_log = get_logger("heartbeat")


class Heartbeat:
    """See the module. ``on_news``: a peer said something new; ``on_silent``: a peer lets a beat wait."""

    def __init__(
        self,
        swarm: Swarm,
        config: Config,
        table: PeerTable,
        gossip: Gossip,
        clones: Clones,
        own: OwnStatus,
        on_news: Callable[[], None],
        on_silent: Callable[[PeerId], None] = lambda peer_id: None,
    ) -> None:
        self._swarm, self._config = swarm, config
        self._table, self._gossip, self._clones, self._own = table, gossip, clones, own
        self._on_news, self._on_silent = on_news, on_silent
        self._beats: dict[PeerId, trio.CancelScope] = {}
        self._over: dict[PeerId, tuple[ConnectionView, trio.CancelScope]] = {}  # where these beats go
        self._hurries: dict[PeerId, trio.Event] = {}  # beat soon
        self._partings: set[PeerId] = set()
        self._answering: Counter[PeerId] = Counter()

    # --- who --------------------------------------------------------------------------------------------------------------

    def is_beating(self, peer_id: PeerId) -> bool:
        """Whether `beat` runs for the peer."""
        return peer_id in self._beats

    def stop(self, peer_id: PeerId) -> None:
        """The peer's last connection is gone."""
        self._partings.discard(peer_id)
        if scope := self._beats.pop(peer_id, None):
            scope.cancel()

    def move(self, peer_id: PeerId) -> None:
        """The peer's best connection is another now: beat there."""
        if over := self._over.get(peer_id):
            connection, scope = over
            if self._swarm.connections().get(peer_id) != connection:
                scope.cancel()

    def part(self, peer_id: PeerId) -> None:
        """There are too many neighbours: tell this one so with the next beat, which goes out soon, and cut it off."""
        self._partings.add(peer_id)
        self._hurry(peer_id)

    async def farewell(self) -> None:
        """Tell every neighbour at once that we leave. Deadlines are the caller's: FAREWELL_S is enough."""
        signed = self._own.farewell()
        async with trio.open_nursery() as nursery:
            for peer_id in tuple(self._beats):
                nursery.start_soon(self._say_farewell, peer_id, signed)

    async def _say_farewell(self, peer_id: PeerId, signed: Signed) -> None:
        try:
            frames = FrameStream(await self._swarm.open_stream(peer_id, STATUS))
            await frames.send(BEAT, Beat(1, (signed,)))
            await frames.receive(ECHO)
        except MeshmaxError as error:
            _log.debug("a farewell was not heard", peer=peer_id, why=error.message)

    # --- beats ----------------------------------------------------------------------------------------------------------------

    async def beat(self, peer_id: PeerId) -> None:
        """Beat until the peer's connections are gone; cut those on which it does not answer."""
        with trio.CancelScope() as scope:
            self._beats[peer_id] = scope
            try:
                while (connection := self._swarm.connections().get(peer_id)) is not None:
                    with trio.CancelScope() as over:
                        self._over[peer_id] = connection, over
                        await self._beat_over(connection)
            finally:
                if (
                    self._beats.get(peer_id, scope) is scope
                ):  # `stop` took it out, or it is ours: nobody beats anew already
                    self._beats.pop(peer_id, None)
                    self._over.pop(peer_id, None)
                    self._hurries.pop(peer_id, None)

    async def _beat_over(self, connection: ConnectionView) -> None:
        """Beat on the peer's best connection, which is this one, until it fails; then cut it and older ones like it."""
        peer_id = connection.peer_id
        try:
            async with self._patiently(connection):
                stream = await self._swarm.open_stream(peer_id, STATUS, eager=True)
            try:
                await self._beat_on(FrameStream(stream), connection)
                return
            finally:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        except MeshmaxError as error:
            _log.info("connection lost", peer=peer_id, why=error.message)
            await self._swarm.disconnect(peer_id, connection)

    @asynccontextmanager
    async def _patiently(self, connection: ConnectionView) -> AsyncIterator[None]:
        """For a word of the peer that the block waits for. Raises PeerGone where the connection is silent for too long."""
        silence = Silence(self._config.heartbeat_timeout_s, trio.current_time())
        outcome: MeshmaxError | None = PeerGone("its heartbeat stopped")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, connection, silence, nursery.cancel_scope)
            try:
                yield
                outcome = None
            except MeshmaxError as error:
                outcome = error  # not in a group
            nursery.cancel_scope.cancel()
        if outcome is not None:
            raise outcome

    async def _listen(self, connection: ConnectionView, silence: Silence, scope: trio.CancelScope) -> None:
        entry = self._table.entry(connection.peer_id)
        patience_s = max(SILENT_S, SILENT_ROUND_TRIPS * (entry.rtt_s or 0.0) if entry else 0.0)
        doubted = False
        while not silence.is_over:
            await trio.sleep(silence.look_s)
            heard = self._swarm.heard_s(connection.peer_id, connection) if isinstance(self._swarm, HearsPeers) else None
            silence.on_look(heard)
            if silence.silent_s >= patience_s and not doubted:
                doubted = True
                self._on_silent(connection.peer_id)
        scope.cancel()

    async def _beat_on(self, frames: FrameStream, connection: ConnectionView) -> None:
        """Beat until it fails, or until the peer was told that we part."""
        peer_id = connection.peer_id
        nonce, told, twins_at = 0, -1, float("-inf")
        self._gossip.start_afresh(peer_id)
        while True:
            hurry = self._hurries[peer_id] = trio.Event()
            own, reissued, started = self._own.status, self._own.reissued, trio.current_time()
            twins = self._clones.twins(peer_id, started) if started - twins_at >= TELL_S else ()
            twins_at = started if twins else twins_at
            parting: Parting = "full" if peer_id in self._partings else ""
            statuses, notices, wants = self._outgoing(peer_id, twins)
            vitals = vitals_of(own) if own.sequence > told else None
            async with self._patiently(connection):
                await frames.send(BEAT, Beat(nonce, statuses, notices, wants, vitals, parting))
                echo = await frames.receive(ECHO)
            if echo.nonce != nonce:
                raise RemoteProtocolError("the peer echoed another heartbeat than it was sent")
            now = trio.current_time()
            self._note_alive(peer_id, now - started, now)
            if nonce == 0:
                self._table.on_teller_lost(peer_id)
            self._take(echo, peer_id)
            if parting:
                await self._swarm.disconnect(peer_id)
                return
            nonce, told = nonce + 1, own.sequence
            if self._gossip.is_waiting(peer_id):
                self._hurry(peer_id)
            with trio.move_on_after(self._config.heartbeat_s):
                await self._either(reissued, hurry)

    def _note_alive(self, peer_id: PeerId, rtt_s: float, now: float) -> None:
        connection = self._swarm.connections().get(peer_id)
        if self._table.entry(peer_id) is None and connection is not None:  # the table was cleared since it connected
            self._table.on_connected(peer_id, connection.address, now, connection.direction == "out", connection.path)
        self._table.on_round_trip(peer_id, rtt_s, now)

    async def _either(self, reissued: trio.Event, hurry: trio.Event) -> None:
        """Wait until our status is another, or BEAT_PACE_S after somebody is in a hurry."""

        async def soon() -> None:
            await hurry.wait()
            await trio.sleep(BEAT_PACE_S)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(soon)
            await reissued.wait()
            nursery.cancel_scope.cancel()

    def _hurry(self, peer_id: PeerId) -> None:
        event = self._hurries.get(peer_id)
        if event is not None:  # an Event has no truth value
            event.set()

    # --- answers ----------------------------------------------------------------------------------------------------------

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
        told, twins_at = -1, float("-inf")
        peer = frames.peer
        while True:
            beat = await self._try_hear(frames)
            if beat is None:  # it ended the stream, or beats no more; our own beats decide whether it lives
                return
            if beat.nonce == 0:
                self._gossip.on_fresh(peer)
            self._take(beat, peer)
            if beat.parting:
                self._table.on_parting(peer)
            now, own = trio.current_time(), self._own.status
            twins = self._clones.twins(peer, now) if now - twins_at >= TELL_S else ()
            twins_at = now if twins else twins_at
            statuses, notices, wants = self._outgoing(peer, twins)
            vitals = vitals_of(own) if own.sequence > told else None
            told = own.sequence
            await frames.send(ECHO, Echo(beat.nonce, statuses, notices, wants, vitals))
            if self._gossip.is_waiting(peer):
                self._hurry(peer)
            await trio.sleep(BEAT_PACE_S)

    async def _try_hear(self, frames: FrameStream) -> Beat | None:
        """The next beat; None where the stream ended, or none came for too long."""
        beat_s = self._config.heartbeat_s
        silence = Silence(beat_s * SILENCE_FACTOR, trio.current_time(), look_s=beat_s)
        while not silence.is_over:
            beat = None
            with trio.move_on_after(silence.look_s) as scope:
                beat = await frames.try_receive(BEAT)
            if not scope.cancelled_caught:
                return beat
            silence.on_look(None)
        return None

    # --- what is carried --------------------------------------------------------------------------------------------------

    def _outgoing(self, peer_id: PeerId, twins: tuple[Signed, ...]) -> tuple[tuple[Signed, ...], bytes, bytes]:
        room = MAX_STATUS_BYTES - sum(len(signed.payload) for signed in twins)
        out = self._gossip.message_for(peer_id, trio.current_time(), MAX_STATUSES - len(twins), room)
        return (*twins, *out.statuses), pack_notices(out.notices), b"".join(out.wants)

    def _take(self, message: Beat | Echo, bearer: PeerId) -> None:
        """What a neighbour's message carries. Raises RemoteProtocolError."""
        now = trio.current_time()
        news = self._take_statuses(message.statuses, bearer, now)
        self._gossip.on_notices(bearer, read_notices(message.notices), now)
        self._gossip.on_wants(bearer, read_wants(message.wants))
        if message.vitals is not None:
            check_vitals(message.vitals)
            entry = self._table.entry(bearer)
            self._clones.on_vitals(entry.status if entry else None, message.vitals, now)
            news |= self._table.on_vitals(bearer, message.vitals)
        if news:
            self._on_news()

    def _take_statuses(self, statuses: Sequence[Signed], bearer: PeerId, now: float) -> bool:
        check_statuses(tuple(statuses))
        news, signers = False, Counter[PeerId]()
        for signed in statuses:
            if self._gossip.is_known(signed, bearer):
                continue  # it came from another neighbour, or from itself, meanwhile
            signers[signed.signer] += 1
            if signers[signed.signer] > SAME_SIGNER or not self._gossip.is_welcome(signed, bearer):
                continue
            try:
                status: PeerStatus = read_status(signed)
            except ManifestInvalid as error:
                raise RemoteProtocolError(f"the peer sent a status that is not valid: {error.message}") from error
            if status.mesh == self._own.status.mesh:
                news |= self._gossip.on_status(status, signed, bearer, now)
        return news
