"""MemoryLanes: blob lanes without sockets, threads or ciphers, for simulated time; satisfy the ports of lanes.

`read` and `sink` run in place. A `pause` cannot wait in place, so the lane waits after the chunk instead. Faults on demand:
a port that cannot be reached, lanes that are cut, a server that lies. What was carried is counted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from meshmax.base.errors import BlobNotFound, Busy, ChunkMismatch, LocalProtocolError, PeerGone, StoreError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.ports import (
    ByteStream,
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneDial,
    LaneEvent,
    LaneLacking,
    LaneStoreFailed,
    Pace,
    at_once,
)
from meshmax.wire.lane import AES_128_GCM, LANE_ID_BYTES, MAX_WANTS, SECRET_BYTES, LaneAsk, LaneGrant

CHUNK_S: Final = 0.001  # virtual seconds that a chunk takes


class LaneNetwork:
    """Where lanes of one site meet. ``carried``: (server, fetcher, index) of each chunk that came over a lane."""

    def __init__(self) -> None:
        self.blocked: set[PeerId] = set()  # servers whose port is never answered
        self.liars: set[PeerId] = set()  # servers that flip a bit of each chunk
        self.carried: list[tuple[PeerId, PeerId, int]] = []
        self.open: set[_Wire] = set()
        self.expected: dict[bytes, MemoryExpected] = {}
        self.ids = itertools.count(1)

    def cut(self, server: PeerId) -> int:
        """End every lane that ``server`` serves, as a router does that forgets them: how many."""
        wires = [wire for wire in self.open if wire.server == server]
        for wire in wires:
            wire.end(lost=True)
        return len(wires)


class _Wire:
    """What both ends of one lane share."""

    def __init__(self, network: LaneNetwork, server: PeerId, fetcher: PeerId) -> None:
        self.network, self.server, self.fetcher = network, server, fetcher
        self.wants: deque[tuple[Sha256, int]] = deque()
        self.answers: deque[LaneEvent | tuple[Sha256, int, bytes]] = deque()
        self.due: set[tuple[Sha256, int]] = set()
        self.ended = self.lost = False
        self.changed = trio.Event()
        network.open.add(self)

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def end(self, lost: bool = False) -> None:
        self.ended, self.lost = True, self.lost or lost
        self.network.open.discard(self)
        self.change()

    def require_whole(self) -> None:
        if self.lost:
            raise PeerGone("the lane was lost")


class _End:
    def __init__(self, wire: _Wire, peer: PeerId) -> None:
        self.peer = peer
        self._wire = wire
        self._owes_s = 0.0

    def close(self) -> None:
        """See ports.FetchLane."""
        self._wire.end()

    def pause(self, seconds: float) -> None:
        """See ports.FetchLane; the wait comes after the chunk."""
        if self._wire.ended:
            raise PeerGone("the lane was closed")
        self._owes_s += seconds

    async def _wait(self) -> None:
        wait_s, self._owes_s = CHUNK_S + self._owes_s, 0.0
        await trio.sleep(wait_s)


class MemoryFetchLane(_End):
    """Satisfies ports.FetchLane."""

    def want(self, digest: Sha256, indexes: Sequence[int]) -> None:
        """See ports.FetchLane."""
        if self._wire.ended:
            raise PeerGone("the lane has ended")
        chunks = {(digest, index) for index in indexes}
        if len(chunks) < len(indexes) or chunks & self._wire.due or len(self._wire.due | chunks) > MAX_WANTS:
            raise LocalProtocolError("a chunk is wanted twice, or too many are")
        self._wire.due |= chunks
        self._wire.wants.extend((digest, index) for index in indexes)
        self._wire.change()

    def cancel(self, digest: Sha256, index: int) -> None:
        """See ports.FetchLane."""
        if (digest, index) in self._wire.wants:
            self._wire.wants.remove((digest, index))
            self._wire.answers.append(LaneCancelled(digest, index))
            self._wire.change()

    async def run(
        self,
        sink: Callable[[Sha256, int, memoryview], None],
        tell: Callable[[LaneEvent], None],
        pace: Pace = at_once,
    ) -> None:
        """See ports.FetchLane."""
        wire = self._wire
        try:
            while not wire.ended:
                if not wire.answers:
                    await wire.changed.wait()
                    continue
                answer = wire.answers.popleft()
                if isinstance(answer, tuple):
                    _paced(pace, len(answer[2]))
                    event = self._sunk(sink, *answer)
                else:
                    event = answer
                wire.due.discard((event.digest, event.index))
                tell(event)
                await self._wait()
        finally:
            wire.end()
        wire.require_whole()

    def _sunk(
        self, sink: Callable[[Sha256, int, memoryview], None], digest: Sha256, index: int, data: bytes
    ) -> LaneEvent:
        self._wire.network.carried.append((self._wire.server, self._wire.fetcher, index))
        try:
            sink(digest, index, memoryview(data))
        except ChunkMismatch:
            return LaneBad(digest, index, len(data))
        except StoreError as error:
            return LaneStoreFailed(digest, index, error)
        return LaneArrived(digest, index, len(data))


class MemoryServeLane(_End):
    """Satisfies ports.ServeLane."""

    sending_s = 0.0  # sending takes no time of its own

    async def run(self, read: Callable[[Sha256, int, memoryview], int], pace: Pace = at_once) -> None:
        """See ports.ServeLane."""
        wire = self._wire
        try:
            while not wire.ended:
                if not wire.wants:
                    await wire.changed.wait()
                    continue
                answer = self._answer(read, *wire.wants.popleft())
                if isinstance(answer, tuple):
                    _paced(pace, len(answer[2]))
                await self._wait()
                wire.answers.append(answer)
                wire.change()
        finally:
            wire.end()
        wire.require_whole()

    def _answer(
        self, read: Callable[[Sha256, int, memoryview], int], digest: Sha256, index: int
    ) -> LaneEvent | tuple[Sha256, int, bytes]:
        buffer = bytearray(CHUNK_BYTES)
        try:
            size = read(digest, index, memoryview(buffer))
        except Busy as error:
            return LaneBusy(digest, index, error.retry_after_s)
        except (BlobNotFound, StoreError):
            return LaneLacking(digest, index)
        if self._wire.server in self._wire.network.liars:
            buffer[0] ^= 1
        return digest, index, bytes(memoryview(buffer)[:size])


def _paced(pace: Pace, size: int) -> None:
    while size:
        size -= pace(size)


class MemoryExpected:
    """Satisfies ports.ExpectedLane."""

    def __init__(self, server: PeerId, fetcher: PeerId, grant: LaneGrant) -> None:
        self.server, self.fetcher = server, fetcher
        self.grant = grant
        self.lane: MemoryServeLane | None = None
        self.came = trio.Event()

    async def arrive(self) -> MemoryServeLane:
        """See ports.ExpectedLane."""
        with trio.move_on_after(10.0):
            await self.came.wait()
        if self.lane is None:
            raise PeerGone("the peer did not come to the lane that it asked for")
        return self.lane


class NoBytes:
    """A connection that carries nothing; satisfies ports.ByteStream."""

    def __init__(self, ip: str, port: int) -> None:
        self.remote = (ip, port)
        self.closed = False

    async def send_all(self, data: bytes) -> None:
        """See ports.ByteStream."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ports.ByteStream."""
        await trio.lowlevel.checkpoint()
        return b""

    def close(self) -> None:
        """See ports.ByteStream."""
        self.closed = True


class MemoryLanes:
    """One peer's lanes; satisfies ports.Lanes. An IP address is not looked at, and what a connection carries neither."""

    port = 11436
    external_port = 0

    def __init__(self, network: LaneNetwork, peer: PeerId) -> None:
        self._network, self._peer = network, peer

    def ask(self) -> LaneAsk:
        """See ports.Lanes."""
        return LaneAsk(bytes(SECRET_BYTES), (AES_128_GCM,))

    @contextmanager
    def expect(self, peer: PeerId, ask: LaneAsk) -> Iterator[MemoryExpected]:
        """See ports.Lanes."""
        lane_id = next(self._network.ids).to_bytes(LANE_ID_BYTES, "big")
        expected = MemoryExpected(
            self._peer, peer, LaneGrant(lane_id, ask.secret, ask.ciphers[0], self.port, self.external_port)
        )
        self._network.expected[lane_id] = expected
        try:
            yield expected
        finally:
            self._network.expected.pop(lane_id, None)

    async def dial(self, ip: str, grant: LaneGrant) -> ByteStream:
        """See ports.Lanes."""
        await trio.sleep(CHUNK_S)
        expected = self._network.expected.get(grant.lane_id)
        if expected is not None and expected.server in self._network.blocked:
            await trio.sleep_forever()
        return NoBytes(ip, grant.port)

    async def connect(self, peer: PeerId, via: str | LaneDial, ask: LaneAsk, grant: LaneGrant) -> MemoryFetchLane:
        """See ports.Lanes."""
        stream = await (self.dial(via, grant) if isinstance(via, str) else via())
        stream.close()
        expected = self._network.expected.pop(grant.lane_id, None)
        if expected is None or expected.fetcher != self._peer:
            raise PeerGone("nobody expects this lane")
        wire = _Wire(self._network, peer, self._peer)
        expected.lane = MemoryServeLane(wire, self._peer)
        expected.came.set()
        return MemoryFetchLane(wire, peer)

    async def take(self, stream: ByteStream) -> None:
        """See ports.Lanes: the fetcher's `connect` has told already which lane it is."""
        stream.close()
        await trio.lowlevel.checkpoint()

    def close_peer(self, peer: PeerId) -> None:
        """See ports.Lanes."""
        for wire in [wire for wire in self._network.open if {wire.server, wire.fetcher} == {peer, self._peer}]:
            wire.end(lost=True)
