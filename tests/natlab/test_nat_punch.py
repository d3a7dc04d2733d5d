"""Which pairs of NATs a simultaneous open of TCP gets through, in the kernel: the verdict that the simulated NATs share."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio

from meshmax.base.traversal import Candidate
from meshmax.net.punch import TcpPuncher
from meshmax.ports import ByteStream, PunchPort
from meshmax.testing.fork_server import ForkServer
from tests.natlab.lab import Host, open_lab, why_not
from tests.natlab.nat_lab import NETWORK, NatKind
from tests.natlab.nat_pair import possible_directly
from tests.natlab.nat_site import NatSite, open_nat_site

pytestmark = pytest.mark.natlab
OBSERVERS = [(f"{NETWORK}.{number}", 11437) for number in (1, 2)]
PUNCHED: tuple[NatKind, ...] = ("full", "addr", "port", "sym", "reject", "noudp")


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab, open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks) as site:
        yield site


class Side:
    """One end of an attempt, in a thread of its own."""

    def __init__(self, host: Host, meeting: threading.Barrier) -> None:
        self.host, self.meeting = host, meeting
        self.other: Side
        self.candidates: tuple[Candidate, ...] = ()

    def run(self) -> float:
        """Seconds until connected; 0 if it never was."""
        with self.host.inside():
            return trio.run(self._run)

    async def _run(self) -> float:
        async with TcpPuncher().open_port(OBSERVERS) as port:
            self.candidates = port.candidates
            await trio.to_thread.run_sync(self.meeting.wait)
            targets = [candidate for candidate in self.other.candidates if candidate.kind == "srflx"]
            sink, source = trio.open_memory_channel[ByteStream](8)
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_punch, port, targets, sink)
                async for stream in source:
                    took = trio.current_time() - began
                    if await _is_the_other(stream):
                        nursery.cancel_scope.cancel()
                        return took
        return 0.0


async def _punch(port: PunchPort, targets: Sequence[Candidate], sink: trio.MemorySendChannel[ByteStream]) -> None:
    async with sink:
        await port.run(targets, sink)


async def _is_the_other(stream: ByteStream) -> bool:
    answer = b""
    try:
        with trio.move_on_after(0.5):
            await stream.send_all(b"x")
            answer = await stream.receive_some(1)
        return answer == b"x"
    finally:
        await trio.sleep(0.1)  # the other one hears us, too
        stream.close()


def attempt(site: NatSite, left: NatKind, right: NatKind) -> float:
    meeting = threading.Barrier(2)
    sides = []
    for router, kind in zip(site.routers, (left, right), strict=True):
        router.become(kind)
        sides.append(Side(router.behind("host"), meeting))
    sides[0].other, sides[1].other = sides[1], sides[0]
    with ThreadPoolExecutor(2) as pool:
        return min(pool.map(Side.run, sides))


@pytest.mark.parametrize(("left", "right"), [*itertools.combinations_with_replacement(PUNCHED, 2)])
def test_tcp_gets_through_every_pair_but_a_symmetric_nat_and_one_that_filters_by_port(
    site: NatSite, left: NatKind, right: NatKind
) -> None:
    took_s = attempt(site, left, right)
    print(f"{left} {right} {took_s:.3f} s")
    assert bool(took_s) is possible_directly(left, right)
