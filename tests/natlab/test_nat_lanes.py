"""Blob lanes through two of the kernel's NATs that filter by port: they get through; a dead one is noticed, another follows."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
import trio

from meshmax.base.errors import PeerGone
from meshmax.net import lane_socket
from meshmax.net.lanes import TcpLanes, open_lanes
from meshmax.net.observer import open_observer
from meshmax.net.punch import TcpPuncher
from meshmax.ports import ByteStream, LaneEvent
from meshmax.services.stun_server import StunServer
from tests.loopback.lane_site import DIGEST, FETCHER, SERVER, chunk_of, read
from tests.natlab.lab import Host, open_lab, why_not
from tests.natlab.nat_lab import Internet, Router, open_internet

pytestmark = pytest.mark.natlab
OBSERVER_PORT = 11437
CHUNKS = 40
PAUSE_S = 0.05  # before each chunk, so that a fault meets a transfer


class Side:
    """A peer in a thread of its own; ``words`` go to the other one."""

    def __init__(self, host: Host, observer: tuple[str, int]) -> None:
        self.host, self.observer = host, observer
        self.words = queue.SimpleQueue[Any]()
        self.sunk: dict[int, bytes] = {}
        self.lost_s: list[float] = []  # monotonic
        self.other: Side

    def run(self, part: Callable[[Side], Awaitable[None]]) -> None:
        with self.host.inside():
            trio.run(part, self)

    async def hear(self) -> Any:
        return await trio.to_thread.run_sync(self.other.words.get)

    async def meet(self, nursery: trio.Nursery, stack: AsyncExitStack) -> ByteStream:
        """One connection by simultaneous open; what is left of the attempt ends with both."""
        port = await stack.enter_async_context(TcpPuncher().open_port([self.observer]))
        self.words.put(port.candidates)
        targets = [candidate for candidate in await self.hear() if candidate.kind == "srflx"]
        sink, source = trio.open_memory_channel[ByteStream](math.inf)
        nursery.start_soon(port.run, targets, sink)
        with trio.fail_after(60):
            return await source.receive()


async def serve(side: Side) -> None:
    """Lanes, one after another, until the other one says that it has everything."""
    async with open_lanes(SERVER, [("0.0.0.0", 0)], lambda ip: True) as lanes:
        while (ask := await side.hear()) is not None:
            async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
                with lanes.expect(FETCHER, ask) as expected:
                    side.words.put(expected.grant)
                    await lanes.take(await side.meet(nursery, stack))
                    lane = await expected.arrive()
                nursery.start_soon(_hear_the_end, side, lane)
                with suppress(PeerGone):
                    await lane.run(slow_read)
                nursery.cancel_scope.cancel()


async def _hear_the_end(side: Side, lane: Any) -> None:
    """As a control connection would: the fetcher gave the lane up."""
    await side.hear()
    lane.close()


def slow_read(digest: Any, index: int, buffer: memoryview) -> int:
    time.sleep(PAUSE_S)
    return read(digest, index, buffer)


async def fetch(side: Side) -> None:
    async with open_lanes(FETCHER, [], lambda ip: True) as lanes:
        while len(side.sunk) < CHUNKS:
            async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
                await _fetch_over_one(side, lanes, nursery, stack)
                side.words.put("given up")
                nursery.cancel_scope.cancel()
        side.words.put(None)


async def _fetch_over_one(side: Side, lanes: TcpLanes, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
    ask = lanes.ask()
    side.words.put(ask)
    grant = await side.hear()
    stream = await side.meet(nursery, stack)

    async def met() -> ByteStream:
        await trio.lowlevel.checkpoint()
        return stream

    lane = await lanes.connect(SERVER, met, ask, grant)

    def sink(digest: Any, index: int, data: memoryview) -> None:
        assert index not in side.sunk
        side.sunk[index] = bytes(data)

    def tell(event: LaneEvent) -> None:
        if len(side.sunk) == CHUNKS:
            lane.close()

    lane.want(DIGEST, [index for index in range(CHUNKS) if index not in side.sunk])
    try:
        await lane.run(sink, tell)
    except PeerGone:
        side.lost_s.append(time.monotonic())


class Site:
    """Two NATs with a peer behind each, and an observer."""

    def __init__(self, internet: Internet) -> None:
        self.internet = internet
        self.routers = [internet.router("left", 10, "port"), internet.router("right", 20, "port")]
        self.point = internet.host("point", 1)
        self.behind = [router.behind(name) for router, name in zip(self.routers, ("one", "two"), strict=True)]

    def transfer(self, fault: Callable[[list[Router]], None] | None = None) -> tuple[Side, float]:
        """CHUNKS from the second peer to the first one; the first one, and when the fault was."""
        observer = f"{self.routers[0].ip.rpartition('.')[0]}.1", OBSERVER_PORT
        sides = [Side(host, observer) for host in self.behind]
        sides[0].other, sides[1].other = sides[1], sides[0]
        self._over = queue.SimpleQueue[None]()
        with ThreadPoolExecutor(3) as pool:
            observing = pool.submit(self._observe)
            works = [pool.submit(sides[0].run, fetch), pool.submit(sides[1].run, serve)]
            try:
                faulty_s = time.monotonic()
                if fault:
                    while len(sides[0].sunk) < CHUNKS / 4 and not any(work.done() for work in works):
                        time.sleep(0.01)
                    fault(self.routers)
                    faulty_s = time.monotonic()
                for work in works:
                    work.result(60)
            finally:
                self._over.put(None)
            observing.result(10)
        return sides[0], faulty_s

    def _observe(self) -> None:
        async def run() -> None:
            answer = StunServer(trio.current_time).answer
            async with open_observer([("0.0.0.0", OBSERVER_PORT)], answer):
                await trio.to_thread.run_sync(self._over.get)

        with self.point.inside():
            trio.run(run)


@pytest.fixture
def site() -> Iterator[Site]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab, open_internet(lab) as internet:
        yield Site(internet)


def test_a_lane_gets_through_two_nats_that_filter_by_port(site: Site) -> None:
    fetcher, _ = site.transfer()
    assert fetcher.sunk == {index: chunk_of(index) for index in range(CHUNKS)}
    assert not fetcher.lost_s


@pytest.mark.parametrize("which", [0, 1])
def test_when_a_router_forgets_a_lane_that_is_noticed_and_the_next_lane_brings_the_rest(
    site: Site, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_socket, "DEAD_S", 4)
    fetcher, faulty_s = site.transfer(lambda routers: routers[which].flush())
    assert fetcher.sunk == {index: chunk_of(index) for index in range(CHUNKS)}
    print([lost_s - faulty_s for lost_s in fetcher.lost_s])
    assert len(fetcher.lost_s) == 1
    assert fetcher.lost_s[0] - faulty_s < 4 + 2 * lane_socket.KEEP_ALIVE_S + 10  # of which the machine may need some
