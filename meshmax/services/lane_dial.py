"""Makes the TCP connection of a lane by whichever way works first (core.lane_ways says which and in which order).

Rules: each way starts HEAD_START_S after the one before, or as soon as that has failed; the first connection is taken, the
others are given up and closed. A way with a head start that lost is remembered as failed: its packets are dropped
somewhere, and the next lane shall not wait for them. So is one that was given up after LONG_S without a connection: whoever
wanted the lane could not wait. Not here: what proves a lane (net.lanes).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

import trio

from meshmax.base.errors import ConnectError, MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.core.lane_ways import LanePeer, Way, WayMemory
from meshmax.ports import ByteStream, LaneDial

HEAD_START_S: Final = 0.3  # a direct connection over half the world is there; a punched one costs both sides more
LONG_S: Final = 2.0  # two round trips over a slow relay and a handshake are done by then

# Agrees with a peer on an attempt, and gives the TCP connection that came of it. Raises MeshmaxError.
OpenLaneStream: TypeAlias = Callable[[PeerId], Awaitable[ByteStream]]


class LaneDialling:
    """One dial. `__call__` is a ports.LaneDial; ``won``: the way that it took."""

    def __init__(self, peer: LanePeer, ways: tuple[Way, ...], dials: Mapping[Way, LaneDial], memory: WayMemory) -> None:
        self.won: Way | None = None
        self._peer, self._ways, self._dials, self._memory = peer, ways, dials, memory
        self._attempts: list[tuple[str, str, str]] = []
        self._stream: ByteStream | None = None

    async def __call__(self) -> ByteStream:
        """The first connection. Raises ConnectError with every attempt."""
        first, last = self._memory.sort(self._peer, self._ways, trio.current_time())
        for ways in (first, last):
            if self.won is None and ways:
                await self._race(ways)
        if self._stream is None:
            raise ConnectError("no connection for a lane to the peer could be made.", self._attempts)
        return self._stream

    def refused(self) -> bool:
        """Who was at the end of the way that won is not the peer: whether another way is left to try."""
        if self.won is None:
            return False
        self._memory.failed(self._peer, self.won, trio.current_time())
        return len(self._ways) > 1

    async def _race(self, ways: tuple[Way, ...]) -> None:
        begun: list[Way] = []
        try:
            async with trio.open_nursery() as nursery:
                for way in ways:
                    begun.append(way)
                    failed = trio.Event()
                    nursery.start_soon(self._try, way, failed, nursery.cancel_scope)
                    with trio.move_on_after(HEAD_START_S):
                        await failed.wait()
        except BaseException:
            if self._stream is not None:
                self._stream.close()
            raise
        if self.won is not None:
            for way in begun[: begun.index(self.won)]:
                self._memory.failed(self._peer, way, trio.current_time())

    async def _try(self, way: Way, failed: trio.Event, scope: trio.CancelScope) -> None:
        began = trio.current_time()
        try:
            stream = await self._dials[way]()
        except trio.Cancelled:
            if self.won is None and trio.current_time() - began >= LONG_S:
                self._memory.failed(self._peer, way, trio.current_time())
            raise
        except MeshmaxError as error:
            self._memory.failed(self._peer, way, trio.current_time())
            self._attempts.append((self._peer.ip or self._peer.peer, way, error.message))
            failed.set()
            return
        if self._stream is not None:
            stream.close()
            return
        self._stream, self.won = stream, way
        self._memory.worked(self._peer, way)
        scope.cancel()
