"""One source of one blob: the fetcher's end of ``/meshmax/blob/1.0.0``.

A Session opens a stream, says what is wanted and cancelled, and turns what comes into events for the owner of the fetch.
It keeps the peer to the protocol (nothing comes that was not asked for, chunks come whole and in order) and knows
nothing of other sources. Its last event is always Gone. Not here: what to ask for (core.fetch), whether a chunk is the
right one (the partial that it is written to).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec
import trio

from meshmax.base.errors import MeshmaxError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import ChunkMap, Haves
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.wire import blob as wire
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.protocols import BLOB

OPEN_TIMEOUT_S: Final = 10.0  # until the source has said what it has
SEND_TIMEOUT_S: Final = 30.0  # for a want of a few bytes


class Offered(msgspec.Struct, frozen=True):
    """The source has said (anew) what it has: ``Session.haves``."""

    peer: PeerId


class Arrived(msgspec.Struct, frozen=True):
    """A whole chunk came; it is not verified."""

    peer: PeerId
    index: int
    data: bytes


class Lacking(msgspec.Struct, frozen=True):
    """The source does not have the chunk."""

    peer: PeerId
    index: int


class Paused(msgspec.Struct, frozen=True):
    """The source is busy."""

    peer: PeerId
    index: int
    retry_after_s: float


class Withdrawn(msgspec.Struct, frozen=True):
    """The source sends no more of a cancelled chunk, of which ``wasted`` bytes had come."""

    peer: PeerId
    index: int
    wasted: int


class Gone(msgspec.Struct, frozen=True):
    """The session is over. ``error`` None: the source ended it in order."""

    peer: PeerId
    error: MeshmaxError | None


SourceEvent: TypeAlias = Offered | Arrived | Lacking | Paused | Withdrawn | Gone


class Session:
    """One stream to ``peer`` about the blob of ``chunk_map``. ``heard`` is called for each part of a chunk."""

    def __init__(self, peer: PeerId, chunk_map: ChunkMap, heard: Callable[[], None]) -> None:
        self.peer = peer
        self.haves = Haves.none(chunk_map.count)
        self._map = chunk_map
        self._heard = heard
        self._scope = trio.CancelScope()
        self._outgoing: deque[wire.Want | wire.Cancel] = deque()  # bounded by the window: a want and a cancel a chunk
        self._wake = trio.Event()
        self._due: set[int] = set()  # chunks whose last word has not come
        self._offer_pending = False
        self._assembly = wire.Assembly(chunk_map)
        self._failure: MeshmaxError | None = None

    def want(self, index: int) -> None:
        """Ask for a chunk; at most MAX_WANTS at once."""
        self._due.add(index)
        self._say(wire.Want(index))

    def withdraw(self, index: int) -> None:
        """Cancel a chunk that was asked for."""
        self._say(wire.Cancel(index))

    def end(self) -> None:
        """Give the session up; its Gone follows."""
        self._scope.cancel()

    def offer_taken(self) -> Haves:
        """What the source has, as its last Offered meant."""
        self._offer_pending = False
        return self.haves

    async def run(self, swarm: Swarm, addresses: tuple[str, ...], events: trio.MemorySendChannel[SourceEvent]) -> None:
        """The whole session; ``addresses`` are where to dial the peer if it is not connected."""
        with self._scope:
            try:
                await self._connected(swarm, addresses, events)
            except MeshmaxError as error:
                self._failure = error
        # Ended from within: the owner still waits for the Gone; ended from outside, this raises Cancelled at once.
        await events.send(Gone(self.peer, self._failure))

    async def _connected(
        self, swarm: Swarm, addresses: tuple[str, ...], events: trio.MemorySendChannel[SourceEvent]
    ) -> None:
        stream: Stream | None = None
        try:
            with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
                if addresses and self.peer not in swarm.connections():
                    await swarm.dial(self.peer, addresses)
                stream = await swarm.open_stream(self.peer, BLOB)
                frames = FrameStream(stream)
                await frames.send(wire.FROM_FETCHER, wire.open_blob(self._map.sha256))
                await self._take(await frames.receive(wire.FROM_SERVER), events)
            if opening.cancelled_caught or stream is None:
                raise PeerGone("the peer did not answer in time")
            await self._talk(frames, events)
        finally:
            if stream is not None:
                with trio.CancelScope(shield=True):
                    await stream.reset()

    async def _talk(self, frames: FrameStream, events: trio.MemorySendChannel[SourceEvent]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, frames, nursery.cancel_scope)
            try:
                while (message := await frames.try_receive(wire.FROM_SERVER)) is not None:
                    await self._take(message, events)
            except MeshmaxError as error:
                self._failure = self._failure or error
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
            self._failure = error
            scope.cancel()

    async def _take(self, message: wire.FromServer, events: trio.MemorySendChannel[SourceEvent]) -> None:
        match message:
            case wire.Have():
                await self._offer(wire.haves_of(message, self._map), events)
            case wire.Gained():
                await self._offer(wire.haves_with(self.haves, message), events)
            case wire.ChunkPart(index=index):
                self._require_due(index)
                self._heard()
                chunk = self._assembly.add(message)
                if chunk is not None:
                    self._due.discard(index)
                    await events.send(Arrived(self.peer, index, chunk))
            case wire.NotHave(index=index):
                self._settle(index)
                await events.send(Lacking(self.peer, index))
            case wire.Busy(index=index, retry_after_s=retry_after_s):
                self._settle(index)
                await events.send(Paused(self.peer, index, retry_after_s))
            case wire.Cancelled(index=index):
                await events.send(Withdrawn(self.peer, index, self._settle(index)))
            case Failure():
                raise error_of(message)

    async def _offer(self, haves: Haves, events: trio.MemorySendChannel[SourceEvent]) -> None:
        self.haves = haves
        if not self._offer_pending:  # a flood of offers becomes one
            self._offer_pending = True
            await events.send(Offered(self.peer))

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
