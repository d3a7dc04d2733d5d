"""Blob lanes: both ends, what they tell, and who opens them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import msgspec

from meshmax.base.errors import StoreError
from meshmax.base.ids import PeerId, Sha256
from meshmax.ports.net import ByteStream
from meshmax.wire.lane import LaneAsk, LaneGrant


class LaneArrived(msgspec.Struct, frozen=True):
    """The sink took the chunk; ``size`` bytes of data."""

    digest: Sha256
    index: int
    size: int


class LaneBad(msgspec.Struct, frozen=True):
    """The sink refused the chunk (ChunkMismatch); ``size`` bytes came for nothing."""

    digest: Sha256
    index: int
    size: int


class LaneLacking(msgspec.Struct, frozen=True):
    """The peer does not have the chunk."""

    digest: Sha256
    index: int


class LaneBusy(msgspec.Struct, frozen=True):
    """The peer does not serve the chunk now; ask again in ``retry_after_s``."""

    digest: Sha256
    index: int
    retry_after_s: float


class LaneCancelled(msgspec.Struct, frozen=True):
    """As asked, the chunk will not come."""

    digest: Sha256
    index: int


class LaneStoreFailed(msgspec.Struct, frozen=True):
    """The sink could not write the chunk (a StoreError, StoreFull among them); the lane goes on."""

    digest: Sha256
    index: int
    error: StoreError


# How many of the next bytes of a chunk (1 at least) may move now: called in the worker thread, where it may `pause`.
Pace: TypeAlias = Callable[[int], int]

# Makes the TCP connection that becomes a lane. Raises ConnectError and other MeshmaxErrors.
LaneDial: TypeAlias = Callable[[], Awaitable[ByteStream]]

LaneEvent: TypeAlias = LaneArrived | LaneBad | LaneLacking | LaneBusy | LaneCancelled | LaneStoreFailed


def at_once(size: int) -> int:
    """The pace of a lane that keeps to no limit."""
    return size


class FetchLane(Protocol):
    """The fetching end of a connection beside the control connection, keyed and proved by both ends.

    Every want gets exactly one last word, an event, unless the lane ends before. `want`, `cancel` and `close` belong to
    trio's thread; one worker thread lives while `run` does.
    """

    @property
    def peer(self) -> PeerId:
        """Whose lane this is."""
        ...

    def want(self, digest: Sha256, indexes: Sequence[int]) -> None:
        """Ask for chunks, at most wire.lane.MAX_WANTS unanswered at once. Never blocks. Raises PeerGone once the lane has
        ended or does not take it, LocalProtocolError beyond the bounds."""
        ...

    def cancel(self, digest: Sha256, index: int) -> None:
        """A chunk is no longer wanted; its last word still comes, and may be that it arrived. No error if the lane has ended."""
        ...

    def close(self) -> None:
        """End the lane now; idempotent. Wakes the worker thread, wherever it waits."""
        ...

    def pause(self, seconds: float) -> None:
        """Worker thread only (a pace that keeps to a limit): wait. Raises PeerGone at once when the lane is closed."""
        ...

    async def run(
        self,
        sink: Callable[[Sha256, int, memoryview], None],
        tell: Callable[[LaneEvent], None],
        pace: Pace = at_once,
    ) -> None:
        """Fetch until the lane is closed by either end in order (returns) or lost. Once only; `close` is implied.

        ``sink(digest, index, data)`` runs in the worker thread: verifies and writes, keeps no reference to ``data``; raises
        ChunkMismatch or StoreError. ``pace`` is asked there before each piece of a chunk is received. ``tell`` runs in this
        task, in order. Raises PeerGone, RemoteProtocolError. Cancelling ends the thread before it returns, in milliseconds
        if ``sink`` takes no longer.
        """
        ...


class ServeLane(Protocol):
    """The serving end."""

    @property
    def peer(self) -> PeerId:
        """Whose lane this is."""
        ...

    @property
    def sending_s(self) -> float:
        """Seconds spent so far in sending, limits included, as against reading and waiting for wants: how loaded our end is."""
        ...

    def close(self) -> None:
        """As FetchLane.close."""
        ...

    def pause(self, seconds: float) -> None:
        """As FetchLane.pause."""
        ...

    async def run(self, read: Callable[[Sha256, int, memoryview], int], pace: Pace = at_once) -> None:
        """Serve until the lane is closed by either end in order (returns) or lost. Once only; `close` is implied.

        ``read(digest, index, buffer)`` runs in the worker thread: puts a verified chunk into ``buffer`` (1 MiB) and returns its
        length; raises BlobNotFound or StoreError (told as lacking) or Busy. ``pace`` is asked there before each piece of it
        is sent. Raises PeerGone, RemoteProtocolError. Cancelling: as FetchLane.run.
        """
        ...


class ExpectedLane(Protocol):
    """A lane whose fetcher has not come yet."""

    @property
    def grant(self) -> LaneGrant:
        """What the fetcher is to be told, inside the control connection."""
        ...

    async def arrive(self) -> ServeLane:
        """Wait until the fetcher has proved the key. Raises PeerGone when it did not in time, or is cut off meanwhile."""
        ...


class Lanes(Protocol):
    """Opens lanes, both ways. Bounded: MAX_LANES in all, MAX_LANES_PER_PEER a peer and direction.

    ``external_port``: where fetchers outside our NAT connect, 0 if nowhere; whoever maps ports sets it.
    """

    external_port: int

    @property
    def port(self) -> int:
        """Where fetchers connect; 0: nowhere, and `expect` refuses."""
        ...

    def ask(self) -> LaneAsk:
        """A fresh secret and our ciphers, for one lane; say it inside the control connection."""
        ...

    def expect(self, peer: PeerId, ask: LaneAsk) -> AbstractContextManager[ExpectedLane]:
        """Let ``peer`` come once within LANE_WAIT_S; leaving the block before it came takes that back; it does not close a lane.

        Raises Busy (bounds), NotOffered (no port), RemoteProtocolError (no cipher in common).
        """
        ...

    async def dial(self, ip: str, grant: LaneGrant) -> ByteStream:
        """A connection to the lane port at ``ip``: the external one where ``ip`` is not on a LAN and there is one. Raises
        ConnectError."""
        ...

    async def connect(self, peer: PeerId, via: str | LaneDial, ask: LaneAsk, grant: LaneGrant) -> FetchLane:
        """Connect to the IP address ``via``, or by it; prove the key, be proved to. Deadlines are the caller's; cancelling
        leaves nothing open. The lane must be `run` or closed. Raises ConnectError, RemoteProtocolError (a grant that does
        not fit), Busy (bounds), whatever ``via`` raises."""
        ...

    async def take(self, stream: ByteStream) -> None:
        """Make a TCP connection that came otherwise than to the lane port the lane that it proves to be, or close it; takes
        ownership. Within seconds; never raises for a stranger's sake."""
        ...

    def close_peer(self, peer: PeerId) -> None:
        """Close every lane with ``peer`` at once and expect none: its last control connection or its membership has ended."""
        ...
