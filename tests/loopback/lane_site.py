"""A server and a fetcher with real lanes between them, and what came over; for the tests of lanes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from meshmax.base.errors import (
    PeerGone,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.units import MIB
from meshmax.net.lane import TcpFetchLane, TcpServeLane
from meshmax.net.lane_socket import STALL_S
from meshmax.net.lanes import TcpLanes, open_lanes
from meshmax.ports import (
    LaneEvent,
)
from meshmax.wire.lane import LaneGrant

FETCHER, SERVER, OTHER = PeerId("fetcher"), PeerId("server"), PeerId("other")
DIGEST = Sha256("ab" * 32)
PROMPTLY_S = 20.0  # for what takes milliseconds on an idle machine, and else a minute


def chunk_of(index: int) -> bytes:
    return bytes([index % 251]) * (MIB if index % 4 else 1000)


def read(digest: Sha256, index: int, buffer: memoryview) -> int:
    data = chunk_of(index)
    buffer[: len(data)] = data
    return len(data)


class Site:
    """A server and a fetcher, and what came over their lanes."""

    def __init__(self, server: TcpLanes, fetcher: TcpLanes) -> None:
        self.server, self.fetcher = server, fetcher
        self.sunk: dict[int, bytes] = {}
        self.events: list[LaneEvent] = []
        self.heard = trio.Event()

    def sink(self, digest: Sha256, index: int, data: memoryview) -> None:
        self.sunk[index] = bytes(data)

    def tell(self, event: LaneEvent) -> None:
        self.events.append(event)
        self.heard.set()

    async def hear(self, count: int) -> None:
        with trio.fail_after(60):
            while len(self.events) < count:
                self.heard = trio.Event()
                await self.heard.wait()

    async def pair(self, port: int | None = None) -> tuple[TcpFetchLane, TcpServeLane]:
        ask = self.fetcher.ask()
        with self.server.expect(FETCHER, ask) as expected:
            grant = expected.grant
            if port is not None:
                grant = LaneGrant(grant.lane_id, grant.secret, grant.cipher, port)
            with trio.fail_after(60):
                lane = await self.fetcher.connect(SERVER, "127.0.0.1", ask, grant)
                return lane, await expected.arrive()

    @asynccontextmanager
    async def running(
        self, port: int | None = None, reads: Callable[[Sha256, int, memoryview], int] = read
    ) -> AsyncIterator[tuple[TcpFetchLane, TcpServeLane]]:
        lane, served = await self.pair(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, partial(served.run, reads))
            nursery.start_soon(lane.run, self.sink, self.tell)
            yield lane, served


async def quietly(run: Callable[[], Awaitable[None]]) -> None:
    with suppress(PeerGone):
        await run()


@asynccontextmanager
async def site(stall_s: float = STALL_S) -> AsyncIterator[Site]:
    async with open_lanes(SERVER, [("127.0.0.1", 0)], lambda ip: True, stall_s) as server:
        async with open_lanes(FETCHER, [], lambda ip: True, stall_s) as fetcher:
            here = Site(server, fetcher)
            yield here
            with trio.fail_after(60):
                while server.count or fetcher.count:  # noqa: ASYNC110  it looks from outside
                    await trio.sleep(0.01)
