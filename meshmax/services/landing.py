"""Where the chunks of one blob land: within our limits, verified, in their place, and told to the owner of the fetch.

A chunk that came over a stream, or from a place on this machine, is landed by the session's own task; one that came over a
lane by the lane's worker thread, straight from the buffer it was received into. A chunk that is not needed any more is
not written. Not here: marking what is written, and what follows (services.pull_blob).
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshmax.base.errors import ChunkMismatch, StoreError
from meshmax.base.ids import PeerId
from meshmax.base.model import ChunkMap
from meshmax.ports import (
    FetchLane,
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneEvent,
    LaneLacking,
    LaneStoreFailed,
    Partial,
    Throttle,
)
from meshmax.services.fetch_events import Bad, Inbox, Lacking, Paused, SourceEvent, Stored, Unwritten, Withdrawn


class Landing:
    """Of one fetch, shared by its sessions."""

    def __init__(
        self, partial: Partial, inbox: Inbox, needs: Callable[[int], bool], throttle: Throttle | None = None
    ) -> None:
        """``needs``: whether a chunk is still missing; cheap, any thread."""
        self.chunk_map: ChunkMap = partial.chunk_map
        self.inbox = inbox
        self._partial = partial
        self.needs = needs
        self._throttle = throttle

    async def admit(self, peer: PeerId, size: int) -> None:
        """Wait until ``size`` bytes may come from ``peer``."""
        if self._throttle and (wait_s := self._throttle.reserve(peer, "in", size)):
            await trio.sleep(wait_s)

    async def land(self, peer: PeerId, index: int, data: bytes) -> None:
        """A whole chunk came, in a task; it was admitted. Tells Stored, Bad or Unwritten."""
        event: SourceEvent = Stored(peer, index, len(data))
        if self.needs(index):
            try:
                await self._partial.write(index, data)
            except ChunkMismatch:
                event = Bad(peer, index, len(data))
            except StoreError as error:
                event = Unwritten(peer, error)
        self.inbox.put(event)

    def admit_in_thread(self, lane: FetchLane, size: int) -> int:
        """How many of the next ``size`` bytes may come over ``lane``, in its thread, after waiting for our limits. Raises
        PeerGone (it was closed)."""
        if self._throttle:
            size = min(size, self._throttle.piece("in"))
            if wait_s := self._throttle.reserve(lane.peer, "in", size):
                lane.pause(wait_s)
        return size

    def land_in_thread(self, index: int, data: memoryview) -> None:
        """A whole chunk came over a lane, in its thread; it was admitted. Raises ChunkMismatch, StoreError."""
        if self.needs(index):
            self._partial.write_blocking(index, data)


def event_of(peer: PeerId, event: LaneEvent) -> SourceEvent:
    """What a lane tells, as any source does."""
    match event:
        case LaneArrived(index=index, size=size):
            return Stored(peer, index, size)
        case LaneBad(index=index, size=size):
            return Bad(peer, index, size)
        case LaneLacking(index=index):
            return Lacking(peer, index)
        case LaneBusy(index=index, retry_after_s=retry_after_s):
            return Paused(peer, index, retry_after_s)
        case LaneCancelled(index=index):
            return Withdrawn(peer, index, 0)
        case LaneStoreFailed(error=error):
            return Unwritten(peer, error)
