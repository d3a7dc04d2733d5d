"""The two ends of a lane, each driven by one worker thread; satisfy ports.FetchLane and ports.ServeLane.

Who does what: trio's thread wants, cancels and closes; the worker reads, verifies through ``sink`` or ``read``, and writes.
Each direction of a lane is sealed by one thread only, so frame numbers need no lock: the fetcher's by trio's thread, the
server's by the worker. What the fetching worker has to tell is queued and told in trio's thread, several at once. A lane
that ends with an End or by our own `close` has ended in order; any other end is PeerGone. What holds its buffers of 1 MiB
is let go of at its end, whoever still knows the lane. Not here: how a lane is opened and counted (net.lanes), frames
(wire.lane_frames).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    ChunkMismatch,
    LocalProtocolError,
    MeshmaxError,
    PeerGone,
    RemoteProtocolError,
    StoreError,
    without_frames,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.base.units import KIB
from meshmax.net.lane_socket import LaneSocket
from meshmax.ports import (
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneEvent,
    LaneLacking,
    LaneStoreFailed,
    Pace,
    at_once,
)
from meshmax.wire.lane import MAX_WANTS
from meshmax.wire.lane_frames import MAX_INDEXES, Frame, Kind, Opener, Sealer

if TYPE_CHECKING:
    from outcome import Outcome

GATHER_S: Final = 0.004  # how long what has happened on a fetching lane may wait to be told; three chunks at 800 MB/s
PIECE_BYTES: Final = 256 * KIB  # of a chunk that comes slowly, so that its source is not taken for silent meanwhile
SLOW_CHUNK_S: Final = 0.5  # what a chunk takes that comes slowly
IDLE_S: Final = 120.0  # a serving lane of which nothing is wanted ends, in order: its place may be somebody else's
GATHER_WANTS: Final = 8  # only while so many chunks are due that the lane will not fall idle meanwhile

Chunk: TypeAlias = tuple[Sha256, int]


class _Lane:
    """What both ends have: a socket, a worker thread while they run, and one way to end."""

    def __init__(
        self, peer: PeerId, sock: LaneSocket, opener: Opener, sealer: Sealer, ended: Callable[[], None]
    ) -> None:
        """``ended`` is called once, in trio's thread, when no thread and no descriptor is left."""
        self.peer = peer
        self._socket, self._opener, self._sealer = sock, opener, sealer
        self._ended = ended
        self._closed = threading.Event()
        self._started = False
        self._woken = trio.Event()
        self._result: Outcome[MeshmaxError | None] | None = None

    @property
    def open(self) -> bool:
        """Neither closed nor lost yet."""
        return not self._closed.is_set()

    def close(self) -> None:
        """See ports.FetchLane."""
        if self._closed.is_set():
            return
        self._farewell()
        self._closed.set()
        self._socket.shut()
        if not self._started:
            self._release()

    def pause(self, seconds: float) -> None:
        """See ports.FetchLane."""
        if self._closed.wait(seconds):
            raise PeerGone("the lane was closed")

    def _farewell(self) -> None:
        """Say what can be said without waiting."""

    def _release(self) -> None:
        self._socket.close()
        del self._opener, self._sealer  # nothing is said or heard any more, and their buffers are large
        ended, self._ended = self._ended, _nothing  # it knows the place of this lane, which knows the lane
        ended()

    async def _drive(self, work: Callable[[], None], tell_all: Callable[[], None]) -> None:
        """Run ``work`` in a thread, calling ``tell_all`` whenever the thread calls `_wake`, until it has ended."""
        await trio.lowlevel.checkpoint()
        if self._started:
            raise LocalProtocolError("a lane runs once")
        if self._closed.is_set():
            return
        self._started = True
        token = trio.lowlevel.current_trio_token()
        # The thread cache itself, not to_thread.run_sync: this task goes on while the thread works, and needs no nursery
        # (whose groups would wrap every error) for that. Threads are counted by net.lanes, as lanes.
        trio.lowlevel.start_thread_soon(
            lambda: _error_of(work),
            lambda result: token.run_sync_soon(self._finished, result),
            f"lane with {self.peer[-8:]}",
        )
        try:
            while self._result is None:
                await self._woken.wait()
                self._woken = trio.Event()
                tell_all()
                await self._gather()
        finally:
            ours = not self.open
            self.close()
            with trio.CancelScope(shield=True):
                while self._result is None:
                    await self._woken.wait()
                    self._woken = trio.Event()
            self._release()
            tell_all()  # what was done before a cancellation counts, too
        result, self._result = self._result, None
        error = result.unwrap()
        del result
        try:
            if error is not None and not ours:
                raise error
        finally:
            del error  # it comes to know this frame

    async def _gather(self) -> None:
        """Wait a moment if what comes next may well be told together with what follows it."""

    def _finished(self, result: Outcome[MeshmaxError | None]) -> None:
        self._result = result
        self._woken.set()


def _nothing() -> None:
    pass


def _error_of(work: Callable[[], None]) -> MeshmaxError | None:
    """How ``work`` ended. Without the frames of its thread, whose variables are views of the buffers."""
    try:
        work()
    except MeshmaxError as error:
        return without_frames(error)
    return None


class TcpFetchLane(_Lane):
    """The fetching end; satisfies ports.FetchLane."""

    def __init__(
        self, peer: PeerId, sock: LaneSocket, opener: Opener, sealer: Sealer, ended: Callable[[], None]
    ) -> None:
        super().__init__(peer, sock, opener, sealer, ended)
        # Added to by trio's thread, taken from by the worker: single operations on a set, which the interpreter makes whole.
        self._due: set[Chunk] = set()
        self._events: deque[LaneEvent] = deque()  # at most one a want
        self._waking = False
        self._piece_bytes = PIECE_BYTES  # until a chunk has come quickly
        self._token: trio.lowlevel.TrioToken | None = None

    def want(self, digest: Sha256, indexes: Sequence[int]) -> None:
        """See ports.FetchLane."""
        self._require_open()
        chunks = [(digest, index) for index in indexes]
        if len(self._due) + len(chunks) > MAX_WANTS:
            raise LocalProtocolError(f"a lane takes at most {MAX_WANTS} wants at once")
        if len(set(chunks)) < len(chunks) or not self._due.isdisjoint(chunks):
            raise LocalProtocolError("a chunk is wanted once at a time")
        self._due.update(chunks)  # before it is said: the answer may be here before we are
        for start in range(0, len(chunks), MAX_INDEXES):
            self._require_open()
            self._say(self._sealer.seal_want(digest, indexes[start : start + MAX_INDEXES]))

    def cancel(self, digest: Sha256, index: int) -> None:
        """See ports.FetchLane."""
        if self.open and (digest, index) in self._due:
            self._say(self._sealer.seal(Kind.CANCEL, index, 0, digest))

    async def run(
        self,
        sink: Callable[[Sha256, int, memoryview], None],
        tell: Callable[[LaneEvent], None],
        pace: Pace = at_once,
    ) -> None:
        """See ports.FetchLane."""
        self._token = trio.lowlevel.current_trio_token()

        def tell_all() -> None:
            while self._events:
                tell(self._events.popleft())

        await self._drive(lambda: self._work(sink, pace), tell_all)

    def _require_open(self) -> None:
        if not self.open:
            raise PeerGone("the lane has ended")

    def _say(self, frame: memoryview) -> None:
        if not self._socket.send_now(frame) or self._sealer.last:
            self.close()

    def _farewell(self) -> None:
        self._socket.send_now(self._sealer.seal(Kind.END))

    def _wake(self) -> None:
        if self._token is not None:
            self._token.run_sync_soon(self._woken_by_thread)

    def _woken_by_thread(self) -> None:
        self._woken.set()

    async def _gather(self) -> None:
        # Each waking of trio's thread takes the interpreter from the workers: while much is due, a few chunks share one.
        if len(self._due) >= GATHER_WANTS and self._result is None:
            with trio.move_on_after(GATHER_S):
                await self._woken.wait()  # which only the end of the thread sets meanwhile
        self._waking = False
        if self._events:
            self._woken.set()

    # --- the worker thread ---------------------------------------------------------------------------------------------

    def _work(self, sink: Callable[[Sha256, int, memoryview], None], pace: Pace) -> None:
        opener, sock = self._opener, self._socket
        while True:
            if not sock.fill(opener.first, idle=True):
                raise PeerGone("the peer left the lane without a word")
            rest = opener.rest()
            if rest:
                self._fill(rest, pace)
            frame = opener.open()
            if frame.kind is Kind.END:
                return
            event = self._taken(frame, sink)
            self._due.discard((frame.digest, frame.index))
            self._events.append(event)
            if not self._waking:
                self._waking = True
                self._wake()

    def _fill(self, chunk: memoryview, pace: Pace) -> None:
        at, size, moving_s = 0, len(chunk), 0.0
        while at < size:
            piece = chunk[at : at + pace(min(size - at, self._piece_bytes))]
            began_s = time.monotonic()
            self._socket.fill(piece)
            moving_s += time.monotonic() - began_s
            at += len(piece)
        self._piece_bytes = PIECE_BYTES if moving_s >= SLOW_CHUNK_S else CHUNK_BYTES

    def _taken(self, frame: Frame, sink: Callable[[Sha256, int, memoryview], None]) -> LaneEvent:
        digest, index = frame.digest, frame.index
        if (digest, index) not in self._due:
            raise RemoteProtocolError(f"the peer sent a {frame.kind.name} on a lane for a chunk that was not asked for")
        match frame.kind:
            case Kind.CHUNK:
                return _sunk(sink, digest, index, frame.body)
            case Kind.LACKING:
                return LaneLacking(digest, index)
            case Kind.BUSY:
                return LaneBusy(digest, index, frame.retry_after_s)
            case Kind.CANCELLED:
                return LaneCancelled(digest, index)
        raise RemoteProtocolError(f"the peer sent a {frame.kind.name} in the middle of a lane")


def _sunk(sink: Callable[[Sha256, int, memoryview], None], digest: Sha256, index: int, data: memoryview) -> LaneEvent:
    try:
        sink(digest, index, data)
    except ChunkMismatch:
        return LaneBad(digest, index, len(data))
    except StoreError as error:
        return LaneStoreFailed(digest, index, error)
    return LaneArrived(digest, index, len(data))


class TcpServeLane(_Lane):
    """The serving end; satisfies ports.ServeLane."""

    def __init__(
        self, peer: PeerId, sock: LaneSocket, opener: Opener, sealer: Sealer, ended: Callable[[], None]
    ) -> None:
        super().__init__(peer, sock, opener, sealer, ended)
        self._queue: dict[Chunk, None] = {}  # wanted, in the order of asking; the worker's own
        self.sending_s = 0.0

    async def run(self, read: Callable[[Sha256, int, memoryview], int], pace: Pace = at_once) -> None:
        """See ports.ServeLane."""
        await self._drive(lambda: self._work(read, pace), lambda: None)

    # --- the worker thread ---------------------------------------------------------------------------------------------

    def _work(self, read: Callable[[Sha256, int, memoryview], int], pace: Pace) -> None:
        while self._listen():
            if self._sealer.last:
                break
            if self._queue:
                digest, index = chunk = next(iter(self._queue))
                del self._queue[chunk]
                self._answer(digest, index, read, pace)
        self._socket.send(self._sealer.seal(Kind.END))

    def _send(self, frame: memoryview, size: int = 0, pace: Pace = at_once) -> None:
        """Send a frame, the ``size`` bytes of its chunk as ``pace`` has it."""
        began_s = time.monotonic()
        at = len(frame) - size  # what is not chunk goes with its first piece
        sent = 0
        while at < len(frame):
            at += pace(len(frame) - at)
            self._socket.send(frame[sent:at])
            sent = at
        if sent < at:
            self._socket.send(frame)
        self.sending_s += time.monotonic() - began_s

    def _listen(self) -> bool:
        """Take what the fetcher has said, waiting only if there is nothing else to do; False once it has said End, or nothing
        for IDLE_S."""
        while not self._queue or self._socket.readable():
            if not self._queue and not self._socket.readable(IDLE_S):
                return False
            if not self._socket.fill(self._opener.first, idle=True):
                raise PeerGone("the peer left the lane without a word")
            rest = self._opener.rest()
            if rest:
                self._socket.fill(rest)
            frame = self._opener.open()
            match frame.kind:
                case Kind.WANT:
                    self._queue_all(frame)
                case Kind.CANCEL:
                    if self._cancelled(frame):
                        return True
                case Kind.END:
                    return False
                case _:
                    raise RemoteProtocolError(f"the peer sent a {frame.kind.name} in the middle of a lane")
        return True

    def _queue_all(self, frame: Frame) -> None:
        for index in frame.indexes:
            self._queue[frame.digest, index] = None
        if len(self._queue) > MAX_WANTS:
            raise RemoteProtocolError(f"the peer wants more than {MAX_WANTS} chunks at once on a lane")

    def _cancelled(self, frame: Frame) -> bool:
        """Answer a Cancel whose chunk has not been sent; whether no more frame may follow but the End."""
        if (frame.digest, frame.index) in self._queue:
            del self._queue[frame.digest, frame.index]
            self._socket.send(self._sealer.seal(Kind.CANCELLED, frame.index, 0, frame.digest))
        return self._sealer.last

    def _answer(self, digest: Sha256, index: int, read: Callable[[Sha256, int, memoryview], int], pace: Pace) -> None:
        try:
            size = read(digest, index, self._sealer.room)
        except Busy as error:
            self._send(self._sealer.seal_busy(digest, index, error.retry_after_s))
        except (BlobNotFound, StoreError):
            self._send(self._sealer.seal(Kind.LACKING, index, 0, digest))
        else:
            self._send(self._sealer.seal_chunk(digest, index, size), size, pace)
