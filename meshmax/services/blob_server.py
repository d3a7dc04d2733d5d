"""Serves chunks of our blobs, whole or partial: the server's end of ``/meshmax/blob/1.0.0``.

One session a stream. One task takes messages in and never waits for the disk, one reads chunks ahead (the store verifies
each before it is served), one sends them in parts as our bandwidth allows, and one says what has come in since, between
parts: at once, then several chunks together. A chunk that is on its way to another fetcher is answered with Busy
(core.offer). Wants, sessions and time are bounded; a peer that stops reading loses its session. A chunk that turns out
bad on disk is answered with NotHave and the session goes on. Over a relay little is sent, slowly; beyond it Busy is the answer
(core.relay_quota). Not here: what is a good chunk (store), to whom we serve
(node), how much we may send (ports.Throttle).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    MeshmaxError,
    PeerGone,
    RemoteProtocolError,
    StoreCorrupt,
    without_frames,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Haves
from meshmax.core.relay_quota import RELAY_PIECE_BYTES, RelayQuota
from meshmax.ports import BlobStore, Stream, Swarm, Throttle
from meshmax.services.frames import FrameStream
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.services.relay_stream import is_relayed
from meshmax.telemetry.metrics import BYTES, CHUNKS
from meshmax.wire import blob as wire
from meshmax.wire.failure import failure_of
from meshmax.wire.protocols import BLOB

MAX_SESSIONS: Final = 128  # in all; each may hold three chunks of 1 MiB (sent, read, being read)
MAX_SESSIONS_PER_PEER: Final = 8  # a puller uses one a blob, one blob at a time a model
OPEN_TIMEOUT_S: Final = 10.0  # for the first message
IDLE_TIMEOUT_S: Final = 120.0  # without a want; a fetcher that waits for others comes back
SEND_TIMEOUT_S: Final = 30.0  # for one part; a reader slower than 9 kB/s gives its place to another
NEWS_INTERVAL_S: Final = 0.05  # how often a growing blob is announced on a session: a swarm is as quick as its news
NEWS_CHUNKS: Final = 4  # but fewer chunks than that wait, since a message costs each end half a millisecond,
NEWS_WAIT_S: Final = 0.2  # for this since the last news
QUIET_INTERVAL_S: Final = 0.25  # how often it is looked at while it does not grow; a look costs microseconds
BUSY_RETRY_S: Final = 5.0


class BlobServer:
    """Serves ``blobs`` to whoever opens a stream."""

    def __init__(
        self,
        blobs: BlobStore,
        outflow: Outflow | None = None,
        offers: Offers | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        """``offers``: shared with whatever else serves chunks of ``blobs``, such as lanes."""
        self._blobs = blobs
        self._outflow = outflow or Outflow()
        self._offers = offers or Offers(trio.current_time)
        self._throttle = throttle
        self._relayed = RelayQuota()
        self._sessions: Counter[PeerId] = Counter()

    def register(self, swarm: Swarm) -> None:
        """Serve on ``swarm`` from now on."""
        swarm.serve(BLOB, self.answer)

    async def answer(self, stream: Stream) -> None:
        """One session. Raises PeerGone, RemoteProtocolError when it ends badly."""
        frames = FrameStream(stream)
        with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
            first = await frames.receive(wire.FROM_FETCHER)
        if scope.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked for nothing")
        if not isinstance(first, wire.Open):
            raise RemoteProtocolError("the peer asked for chunks before it said of which blob")
        if self._sessions.total() >= MAX_SESSIONS or self._sessions[stream.peer] >= MAX_SESSIONS_PER_PEER:
            await _send(frames, failure_of(Busy("this peer serves as many as it can", BUSY_RETRY_S)))
            return
        self._sessions[stream.peer] += 1
        try:
            await self._session(frames, Sha256(first.digest))
        finally:
            self._sessions[stream.peer] -= 1
            self._sessions += Counter()  # drops the zeros, so that peers that left take no room

    async def _session(self, frames: FrameStream, digest: Sha256) -> None:
        known = await self._blobs.haves(digest)
        if known is None:
            await _send(frames, failure_of(BlobNotFound(f"blob {digest[:12]} is not here")))
            return
        session = _Session(self._blobs, frames, digest, known[1], self._outflow, self._offers, self._throttle)
        if is_relayed(frames.stream):
            session.relayed = self._relayed
        await session.run()


class _Session:
    """One fetcher at one blob."""

    def __init__(
        self,
        blobs: BlobStore,
        frames: FrameStream,
        digest: Sha256,
        haves: Haves,
        outflow: Outflow,
        offers: Offers,
        throttle: Throttle | None,
    ) -> None:
        self._outflow, self._offers, self._throttle = outflow, offers, throttle
        self.relayed: RelayQuota | None = None  # the stream's connection goes over a relay
        self._peer = frames.stream.peer
        self._blobs = blobs
        self._frames = frames
        self._digest = digest
        self._haves = haves
        self._owed: set[int] = set()  # wants without a last word
        self._cancelled: set[int] = set()  # those of them that are no longer wanted
        self._failure: MeshmaxError | None = None
        self._sending = trio.Lock()  # chunks and news share the stream

    async def run(self) -> None:
        """Until the peer ends its side, asks for nothing for long, or goes away."""
        wants, next_want = trio.open_memory_channel[int](wire.MAX_WANTS)
        reads, next_read = trio.open_memory_channel[tuple[int, bytes | None]](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, wants, nursery.cancel_scope)
            nursery.start_soon(self._read_ahead, next_want, reads, nursery.cancel_scope)
            try:
                await self._send(wire.have_of(self._haves))
                nursery.start_soon(self._tell, nursery.cancel_scope)
                await self._serve(next_read)
            except MeshmaxError as error:
                self._fail(error)
            nursery.cancel_scope.cancel()
        if self._failure:
            self._offers.gone(self._digest, self._peer)
            raise self._failure

    def _fail(self, error: MeshmaxError) -> None:
        # Its frames hold chunks and this session, which would hold them by it.
        self._failure = self._failure or without_frames(error)

    async def _hear(self, wants: trio.MemorySendChannel[int], scope: trio.CancelScope) -> None:
        try:
            with wants:  # its end is the end of what is asked
                while (message := await self._frames.try_receive(wire.FROM_FETCHER)) is not None:
                    self._take(message, wants)
        except MeshmaxError as error:
            self._fail(error)
            scope.cancel()

    def _take(self, message: wire.FromFetcher, wants: trio.MemorySendChannel[int]) -> None:
        match message:
            case wire.Want(index=index):
                if index in self._owed:
                    raise RemoteProtocolError(f"the peer asked for chunk {index} twice at once")
                if len(self._owed) >= wire.MAX_WANTS:
                    raise RemoteProtocolError(f"the peer asked for more than {wire.MAX_WANTS} chunks ahead")
                self._owed.add(index)
                wants.send_nowait(index)
            case wire.Cancel(index=index):
                if index in self._owed:
                    self._cancelled.add(index)
            case _:
                raise RemoteProtocolError("the peer opened a blob twice on one stream")

    async def _read_ahead(
        self,
        wants: trio.MemoryReceiveChannel[int],
        reads: trio.MemorySendChannel[tuple[int, bytes | None]],
        scope: trio.CancelScope,
    ) -> None:
        """Read the next chunk while one is being sent; None where there is none to send."""
        try:
            with reads:
                async for index in wants:
                    await reads.send((index, None if index in self._cancelled else await self._read(index)))
        except MeshmaxError as error:
            self._fail(error)
            scope.cancel()

    async def _read(self, index: int) -> bytes | None:
        try:
            return await self._blobs.read_chunk(self._digest, index)
        except (BlobNotFound, StoreCorrupt) as error:
            CHUNKS.labels(direction="out", outcome=error.code).inc()
            return None

    async def _serve(self, reads: trio.MemoryReceiveChannel[tuple[int, bytes | None]]) -> None:
        while True:
            with trio.move_on_after(IDLE_TIMEOUT_S) as idle:
                try:
                    index, chunk = await reads.receive()
                except trio.EndOfChannel:
                    return
            if not idle.cancelled_caught:
                await self._answer(index, chunk)
            elif not self._owed:
                return

    async def _tell(self, scope: trio.CancelScope) -> None:
        """Say what has come in since, as long as something is missing."""
        pause_s, told_s = NEWS_INTERVAL_S, 0.0
        try:
            while not self._haves.whole:
                await trio.sleep(pause_s)
                haves = await self._look()
                if haves == self._haves:
                    pause_s = min(2 * pause_s, QUIET_INTERVAL_S)
                    continue
                pause_s, waited_s = NEWS_INTERVAL_S, trio.current_time() - told_s
                if haves.total < self._haves.total + NEWS_CHUNKS and waited_s < NEWS_WAIT_S and not haves.whole:
                    continue
                news, self._haves, told_s = wire.news_of(self._haves, haves), haves, trio.current_time()
                if news:
                    await self._send(news)
        except MeshmaxError as error:
            self._fail(error)
            scope.cancel()

    async def _look(self) -> Haves:
        known = await self._blobs.haves(self._digest)
        if known is None:
            return Haves.none(self._haves.count)
        return known[1] if known[1].count == self._haves.count else self._haves

    async def _answer(self, index: int, chunk: bytes | None) -> None:
        if index in self._cancelled:
            await self._last_word(wire.Cancelled(index))
        elif chunk is None:
            await self._last_word(wire.NotHave(index))
        elif pause_s := self._relay_pause_s(len(chunk)) or self._offers.ask(self._digest, self._peer, index):
            await self._last_word(wire.Busy(index, min(pause_s, wire.MAX_BUSY_S)))
        else:
            began_s = trio.current_time()
            if self.relayed:
                self.relayed.note(self._peer, len(chunk), began_s)
            if await self._send_chunk(index, chunk):
                self._offers.sent(self._digest, trio.current_time() - began_s)
            else:
                self._offers.lost(self._digest, self._peer, index)

    async def _send_chunk(self, index: int, chunk: bytes) -> bool:
        """Send it in parts; False if it was cancelled in the middle."""
        end = 0
        while end < len(chunk):
            offset = end
            most = RELAY_PIECE_BYTES if self.relayed else wire.PART_BYTES
            end += min(most, self._throttle.piece("out")) if self._throttle else most
            part = wire.ChunkPart(index, offset, chunk[offset:end])
            if self._throttle and (wait_s := self._throttle.reserve(self._peer, "out", len(part.data))):
                await trio.sleep(wait_s)
            if self.relayed:
                await trio.sleep(self.relayed.pace_s(self._peer, len(part.data), trio.current_time()))
            if index in self._cancelled:
                await self._last_word(wire.Cancelled(index))
                return False
            BYTES.labels(direction="out").inc(len(part.data))
            self._outflow.note(self._peer, self._digest, len(part.data))
            if end < len(chunk):
                await self._send(part)
        CHUNKS.labels(direction="out", outcome="ok").inc()
        await self._last_word(part)
        return True

    def _relay_pause_s(self, size_bytes: int) -> float:
        return self.relayed.wait_s(self._peer, size_bytes, trio.current_time()) if self.relayed else 0.0

    async def _last_word(self, message: wire.ChunkPart | wire.Busy | wire.NotHave | wire.Cancelled) -> None:
        # Settled before it is sent: the fetcher may ask for the chunk anew, and cancel that, while we still send.
        self._owed.discard(message.index)
        self._cancelled.discard(message.index)
        await self._send(message)

    async def _send(self, message: wire.FromServer) -> None:
        async with self._sending:
            await _send(self._frames, message)


async def _send(frames: FrameStream, message: wire.FromServer) -> None:
    with trio.move_on_after(SEND_TIMEOUT_S) as scope:
        await frames.send(wire.FROM_SERVER, message)
    if scope.cancelled_caught:
        await frames.stream.reset()
        raise PeerGone("the peer stopped reading")
