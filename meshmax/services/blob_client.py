"""One source of one blob: the fetcher's end of ``/meshmax/blob/1.0.0``, and the lanes beside it.

A Session opens a stream, says what is wanted and cancelled, and turns what comes into events for the owner of the fetch.
Chunks are asked of lanes while there are any (services.lane_client), else on the stream. It keeps the peer to the protocol
(nothing comes that was not asked for, chunks come whole and in order) and knows nothing of other sources. Its last event
is always Gone. Not here: what to ask for (core.fetch), whether a chunk is the right one (services.landing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError, PeerGone, RemoteProtocolError, without_frames
from meshmax.base.ids import PeerId
from meshmax.base.model import Haves
from meshmax.ports import Stream, Swarm
from meshmax.services.fetch_events import Gone, Lacking, Offered, Paused, Withdrawn
from meshmax.services.frames import FrameStream
from meshmax.services.landing import Landing
from meshmax.services.lane_client import MIN_BLOB_BYTES, OpensLanes, SourceLanes
from meshmax.services.lane_client import READY_TIMEOUT_S as LANE_TIMEOUT_S
from meshmax.services.relay_stream import is_relayed
from meshmax.wire import blob as wire
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.protocols import BLOB

OPEN_TIMEOUT_S: Final = 10.0  # until the source has said what it has
SEND_TIMEOUT_S: Final = 30.0  # for a want of a few bytes


class Session:
    """One stream to ``peer`` about one blob, and lanes. ``heard`` is called for each part of a chunk on the stream."""

    def __init__(
        self,
        peer: PeerId,
        landing: Landing,
        heard: Callable[[], None],
        opener: OpensLanes | None = None,
        lane_goal: Callable[[], int] = lambda: 0,
    ) -> None:
        """``lane_goal``: how many lanes there should be now."""
        self.peer = peer
        self._map = landing.chunk_map
        self.haves = Haves.none(self._map.count)
        self._landing = landing
        self._heard = heard
        self._scope = trio.CancelScope()
        self._outgoing: deque[wire.Want | wire.Cancel] = deque()  # bounded by the window: a want and a cancel a chunk
        self._wake = trio.Event()
        self._due: set[int] = set()  # chunks whose last word has not come on the stream
        self._offer_pending = False
        self._held = False
        self._assembly = wire.Assembly(self._map)
        self._failure: MeshmaxError | None = None
        self.relayed = False  # the stream goes over a relay, and stays there whatever better path there is later
        self._lanes: SourceLanes | None = None
        if opener is not None and self._map.size > MIN_BLOB_BYTES:
            self._lanes = SourceLanes(opener, peer, landing, lane_goal, self._ask_again)

    @property
    def lanes(self) -> int:
        """Lanes that are open."""
        return self._lanes.count if self._lanes else 0

    def alive(self) -> bool:
        """Whether something has come since this was asked last that was not told, or is kept waiting by us."""
        return self._held or (self._lanes is not None and self._lanes.alive())

    def want(self, index: int) -> None:
        """Ask for a chunk at the next `flush`; at most wire.MAX_WANTS at once."""
        if self._lanes is None or not self._lanes.want(index):
            self._due.add(index)
            self._say(wire.Want(index))

    def withdraw(self, index: int) -> None:
        """Cancel a chunk that was asked for."""
        if self._lanes is None or not self._lanes.withdraw(index):
            self._say(wire.Cancel(index))

    def flush(self) -> None:
        """Send what is to be asked."""
        if self._lanes is not None:
            self._lanes.flush()

    def end(self) -> None:
        """Give the session up; its Gone follows."""
        self._scope.cancel()

    def offer_taken(self) -> Haves:
        """What the source has, as its last Offered meant."""
        self._offer_pending = False
        return self.haves

    async def run(self, swarm: Swarm, addresses: tuple[str, ...]) -> None:
        """The whole session; ``addresses`` are where to dial the peer if it is not connected."""
        try:
            with self._scope:
                try:
                    await self._connected(swarm, addresses)
                except MeshmaxError as error:
                    self._fail(error)
            self._landing.inbox.put(Gone(self.peer, self._failure))
        finally:
            self._assembly = wire.Assembly(self._map)  # parts of chunks that do not come to their ends
            self._lanes = None  # they know this session

    def _fail(self, error: MeshmaxError) -> None:
        # Its frames hold this session, which would hold them by it, with what they had just received.
        self._failure = self._failure or without_frames(error)

    async def _connected(self, swarm: Swarm, addresses: tuple[str, ...]) -> None:
        with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
            if addresses and self.peer not in swarm.connections():
                await swarm.dial(self.peer, addresses)
        if opening.cancelled_caught:
            raise PeerGone("the peer did not answer in time")
        async with trio.open_nursery() as nursery:
            if self._lanes is not None:
                nursery.start_soon(self._lanes.run)
            try:
                await self._stream(swarm)
            except MeshmaxError as error:
                self._fail(error)
            nursery.cancel_scope.cancel()

    async def _stream(self, swarm: Swarm) -> None:
        stream: Stream | None = None
        try:
            with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
                stream = await swarm.open_stream(self.peer, BLOB)
                self.relayed = is_relayed(stream)
                frames = FrameStream(stream)
                await frames.send(wire.FROM_FETCHER, wire.open_blob(self._map.sha256))
                first = await frames.receive(wire.FROM_SERVER)
            if opening.cancelled_caught or stream is None:
                raise PeerGone("the peer did not answer in time")
            if self._lanes is not None:
                with trio.move_on_after(LANE_TIMEOUT_S):
                    await self._lanes.ready.wait()
            await self._take(first)
            await self._talk(frames)
        finally:
            if stream is not None:
                with trio.CancelScope(shield=True):
                    await stream.reset()

    async def _talk(self, frames: FrameStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, frames, nursery.cancel_scope)
            try:
                while (message := await frames.try_receive(wire.FROM_SERVER)) is not None:
                    await self._take(message)
            except MeshmaxError as error:
                self._fail(error)
            nursery.cancel_scope.cancel()

    async def _write(self, frames: FrameStream, scope: trio.CancelScope) -> None:
        try:
            while True:
                while self._outgoing:
                    with trio.move_on_after(SEND_TIMEOUT_S) as sending:
                        await frames.send(wire.FROM_FETCHER, self._outgoing.popleft())
                    if sending.cancelled_caught:
                        raise PeerGone("the peer stopped reading")
                await self._wake.wait()
                self._wake = trio.Event()
        except MeshmaxError as error:
            self._fail(error)
            scope.cancel()

    async def _take(self, message: wire.FromServer) -> None:
        put = self._landing.inbox.put
        match message:
            case wire.Have():
                self._offer(wire.haves_of(message, self._map))
            case wire.Gained():
                self._offer(wire.haves_with(self.haves, message))
            case wire.ChunkPart(index=index):
                self._require_due(index)
                await self._part(message)
            case wire.NotHave(index=index):
                self._settle(index)
                put(Lacking(self.peer, index))
            case wire.Busy(index=index, retry_after_s=retry_after_s):
                self._settle(index)
                put(Paused(self.peer, index, retry_after_s))
            case wire.Cancelled(index=index):
                put(Withdrawn(self.peer, index, self._settle(index)))
            case Failure():
                raise error_of(message)

    async def _part(self, part: wire.ChunkPart) -> None:
        self._held = True
        try:
            await self._landing.admit(self.peer, len(part.data))
            self._heard()
            chunk = self._assembly.add(part)
            if chunk is not None:
                self._due.discard(part.index)
                await self._landing.land(self.peer, part.index, chunk)
        finally:
            self._held = False

    def _offer(self, haves: Haves) -> None:
        self.haves = haves
        if not self._offer_pending:  # a flood of offers becomes one
            self._offer_pending = True
            self._landing.inbox.put(Offered(self.peer))

    def _ask_again(self, indexes: list[int]) -> None:
        for index in indexes:
            self.want(index)
        self.flush()

    def _settle(self, index: int) -> int:
        self._require_due(index)
        self._due.discard(index)
        return self._assembly.drop(index)

    def _require_due(self, index: int) -> None:
        if index not in self._due:
            raise RemoteProtocolError(f"the peer sent chunk {index}, which was not asked for")

    def _say(self, message: wire.Want | wire.Cancel) -> None:
        self._outgoing.append(message)
        self._wake.set()
