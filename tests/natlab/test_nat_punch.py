"""Which pairs of NATs TCP and UDP get through, in the kernel: the verdicts that the simulated NATs share."""

from __future__ import annotations

import gc
import itertools
import queue
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError
from meshmax.base.traversal import PUNCH_UDP_S, Candidate
from meshmax.net import punch
from meshmax.net.addresses import running_addresses
from meshmax.net.ice import open_channels
from meshmax.net.punch import TcpPuncher
from meshmax.ports import ByteStream, PunchPort
from meshmax.testing.fork_server import ForkServer
from tests.natlab.lab import Host, open_lab, why_not
from tests.natlab.nat_lab import NETWORK, NatKind
from tests.natlab.nat_pair import possible_directly
from tests.natlab.nat_site import NatSite, open_nat_site
from tests.natlab.site import CONTROL_PORT

pytestmark = pytest.mark.natlab
OBSERVERS = [(f"{NETWORK}.{number}", 11437) for number in (1, 2)]
STUN = [(f"{NETWORK}.{number}", CONTROL_PORT) for number in (1, 2)]
PATIENCE_S = 20.0  # where a pair gets through the machine may be slow; where none does there is nothing to wait for
PUNCHED: tuple[NatKind, ...] = ("full", "addr", "port", "sym", "reject", "noudp")


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab, open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks) as site:
        yield site


class Side:
    """One end of an attempt, in a thread of its own. ``words`` go to the other one."""

    def __init__(self, host: Host, patience_s: float) -> None:
        self.host = host
        self.patience_s = patience_s
        self.words = queue.SimpleQueue[Any]()
        self.other: Side

    def run(self, attempt: Callable[[Side], Awaitable[float]]) -> float:
        """Seconds until connected; 0 if it never was."""
        try:
            with self.host.inside():
                return trio.run(attempt, self)
        finally:
            self.words.put(None)

    async def hear(self) -> Any:
        """The other one's next word; None: it has ended."""
        return await trio.to_thread.run_sync(self.other.words.get)


async def over_tcp(side: Side) -> float:
    async with TcpPuncher().open_port(OBSERVERS) as port:
        side.words.put(port.candidates)
        targets = [candidate for candidate in await side.hear() if candidate.kind == "srflx"]
        assert targets, "no observer answered the other side"
        sink, source = trio.open_memory_channel[ByteStream](8)
        began, took = trio.current_time(), 0.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_punch, port, targets, sink)
            async for stream in source:
                here = trio.current_time() - began
                if await _is_the_other(side, stream):
                    took = here
                    break
            nursery.cancel_scope.cancel()
    return took


async def over_udp(side: Side) -> float:
    """The second one answers."""
    async with open_channels(running_addresses) as channels, channels.open_channel(STUN) as end:
        if side.host.name == "left":
            side.words.put(await end.offer())
            await end.accept(await side.hear())
        else:
            side.words.put(await end.answer(await side.hear()))
        began = trio.current_time()
        try:
            with trio.fail_after(side.patience_s):
                stream = await end.connected()
        except (ConnectError, trio.TooSlowError):
            return 0.0
        took: float = trio.current_time() - began
        good: bool = await _is_the_other(side, stream)
        return took if good else 0.0


async def _punch(port: PunchPort, targets: Sequence[Candidate], sink: trio.MemorySendChannel[ByteStream]) -> None:
    async with sink:
        await port.run(targets, sink)


async def _is_the_other(side: Side, stream: ByteStream) -> bool:
    answer = b""
    try:
        with trio.move_on_after(3.0):  # there may be two, of which each side tries another one first
            await stream.send_all(b"x")
            answer = await stream.receive_some(1)
        if answer == b"x":
            side.words.put("heard")
            await side.hear()  # it has heard us, too
        return answer == b"x"
    finally:
        stream.close()


def attempt(site: NatSite, left: NatKind, right: NatKind, how: Callable[[Side], Awaitable[float]]) -> float:
    sides = []
    patience_s = PATIENCE_S if possible_directly(left, right) else PUNCH_UDP_S
    for router, kind, name in zip(site.routers, (left, right), ("left", "right"), strict=True):
        router.become(kind)
        sides.append(Side(router.behind(name), patience_s))
    sides[0].other, sides[1].other = sides[1], sides[0]
    with ThreadPoolExecutor(2) as pool:
        took_s: list[float] = list(pool.map(lambda side: side.run(how), sides))
    print(f"{left} {right} {max(took_s):.3f} s")
    return min(took_s)


@pytest.mark.parametrize(("left", "right"), [*itertools.combinations_with_replacement(PUNCHED, 2)])
def test_tcp_gets_through_every_pair_but_a_symmetric_nat_and_one_that_filters_by_port(
    site: NatSite, left: NatKind, right: NatKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    if possible_directly(left, right):
        monkeypatch.setattr(punch, "PUNCH_TCP_S", PATIENCE_S)
    monkeypatch.setattr(punch, "READY_S", PATIENCE_S)
    assert bool(attempt(site, left, right, over_tcp)) is possible_directly(left, right)


# aioice begins a check in the moment in which it is ended.
@pytest.mark.filterwarnings("ignore:coroutine 'Connection.check_start' was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("left", "right"), [*itertools.combinations_with_replacement(PUNCHED[:-1], 2)])
def test_udp_gets_through_the_same_pairs_unless_it_is_blocked(site: NatSite, left: NatKind, right: NatKind) -> None:
    took_s = attempt(site, left, right, over_udp)
    gc.collect()
    assert bool(took_s) is possible_directly(left, right)
