"""Serves chunks over lanes: the server's end of ``/meshmax/lane/1.0.0``.

Rules: a peer asks on a stream of the control connection and gets the grant of one lane; the stream stays open as long as the
lane does, so the lane ends when the connection does, or the membership that it stands for. The task that answers the
stream owns the lane's thread. A chunk is promised (core.offer), read and verified, and sent in pieces as our
limits allow. Not here: sockets, threads, how many lanes a peer may have (net.lane), what is a good chunk (store).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    MeshmaxError,
    PeerGone,
    RemoteProtocolError,
    StoreError,
    without_frames,
)
from meshmax.base.ids import Sha256
from meshmax.ports import ChunkReader, Lanes, ServeLane, Stream, Swarm, Throttle
from meshmax.services.frames import FrameStream
from meshmax.services.lane_client import end_with
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import BYTES, CHUNKS
from meshmax.wire import lane as wire
from meshmax.wire.failure import failure_of
from meshmax.wire.protocols import LANE

OPEN_TIMEOUT_S: Final = 10.0  # for the ask, and for the grant to be read

_log = get_logger("lanes")
_bytes_out = BYTES.labels(direction="out")
_chunks_ok = CHUNKS.labels(direction="out", outcome="ok")


class LaneServer:
    """Serves ``blobs`` over ``lanes`` to whoever asks on a connection of theirs."""

    def __init__(
        self, blobs: ChunkReader, lanes: Lanes, outflow: Outflow, offers: Offers, throttle: Throttle | None = None
    ) -> None:
        """``offers``: shared with whatever else serves chunks of ``blobs``."""
        self._blobs, self._lanes = blobs, lanes
        self._outflow, self._offers, self._throttle = outflow, offers, throttle

    def register(self, swarm: Swarm) -> None:
        """Serve on ``swarm`` from now on."""
        swarm.serve(LANE, self.answer)

    async def answer(self, stream: Stream) -> None:
        """One lane, from the ask to its end. Raises PeerGone, RemoteProtocolError."""
        frames = FrameStream(stream)
        with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
            ask = await frames.receive(wire.FROM_FETCHER)
        if scope.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked for nothing")
        try:
            lane = await self._arrival(frames, ask)
        except (PeerGone, RemoteProtocolError):
            raise
        except MeshmaxError as error:
            await _send(frames, failure_of(error))
            return
        try:
            await self._serve(lane, stream)
        finally:
            lane.close()

    async def _arrival(self, frames: FrameStream, ask: wire.LaneAsk) -> ServeLane:
        with self._lanes.expect(frames.peer, ask) as expected:
            await _send(frames, expected.grant)
            return await expected.arrive()

    async def _serve(self, lane: ServeLane, stream: Stream) -> None:
        failure: MeshmaxError | None = None
        served: set[Sha256] = set()
        pace = _Pace()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_with, stream, lane)
            try:
                await lane.run(partial(self._read, lane, served, pace), partial(self._pace, lane, pace))
            except MeshmaxError as error:
                failure = without_frames(error)
            nursery.cancel_scope.cancel()
        for digest in served if failure else ():
            self._offers.gone(digest, lane.peer)
        if failure:
            _log.info("lane lost", peer=lane.peer, code=failure.code, error=failure.message)

    def _read(
        self, lane: ServeLane, served: set[Sha256], pace: _Pace, digest: Sha256, index: int, buffer: memoryview
    ) -> int:
        """In the lane's thread: the chunk's length. Raises Busy, BlobNotFound, StoreError."""
        peer = lane.peer
        began_s = time.monotonic()
        if retry_after_s := self._offers.ask(digest, peer, index):
            raise Busy("this chunk is on its way to another peer", retry_after_s)
        served.add(digest)
        try:
            size = self._blobs.read_chunk_into(digest, index, buffer)
        except (BlobNotFound, StoreError) as error:
            self._offers.lost(digest, peer, index)
            CHUNKS.labels(direction="out", outcome=error.code).inc()
            raise
        self._offers.sent(digest, time.monotonic() - began_s + pace.sent_s(lane))
        pace.digest = digest
        _chunks_ok.inc()
        return size

    def _pace(self, lane: ServeLane, pace: _Pace, size: int) -> int:
        """In the lane's thread: how many of a chunk's next ``size`` bytes may be sent, after waiting. Raises PeerGone."""
        if self._throttle:
            size = min(size, self._throttle.piece("out"))
            if wait_s := self._throttle.reserve(lane.peer, "out", size):
                lane.pause(wait_s)
        self._outflow.note(lane.peer, pace.digest, size)
        _bytes_out.inc(size)
        return size


@asynccontextmanager
async def open_lane_server(server: LaneServer, swarm: Swarm, lanes: Lanes) -> AsyncIterator[None]:
    """Serve on ``swarm``, and close the lanes of peers that have no connection any more, both ways."""

    async def watch() -> None:
        async with swarm.subscribe() as events:
            async for event in events:
                if event.kind == "disconnected":
                    lanes.close_peer(event.peer_id)

    server.register(swarm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


class _Pace:
    """Of one lane: what is being sent (``digest``), and what sending the chunk before took."""

    def __init__(self) -> None:
        self.digest = Sha256("")
        self._sending_s = 0.0

    def sent_s(self, lane: ServeLane) -> float:
        """Seconds in sending since the last call."""
        before_s, self._sending_s = self._sending_s, lane.sending_s
        return self._sending_s - before_s


async def _send(frames: FrameStream, message: wire.FromServer) -> None:
    with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
        await frames.send(wire.FROM_SERVER, message)
    if scope.cancelled_caught:
        raise PeerGone("the peer stopped reading")
