"""Which pairs of NATs TCP and UDP get through, in the kernel: the verdicts that the simulated NATs share."""

from __future__ import annotations

import gc
import itertools
import queue
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError
from meshmax.base.traversal import PUNCH_UDP_S, Candidate
from meshmax.net import ice, punch
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
# As peers make them: a SYN that comes when its answer is waited for no more leaves a half-open connection behind, which is in
# the way at these two ports for a minute. That takes a machine that stands still for a while.
ATTEMPTS = 5
ALL_TRIES_S = 6.0  # what punch.TRIES take, the times between them growing
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

        async def greet(stream: ByteStream) -> None:
            nonlocal took
            here = trio.current_time() - began
            try:
                if await _is_the_other(side, stream) and not took:
                    took = here
                    await _until_both_know(side)
                    nursery.cancel_scope.cancel()
            finally:
                stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_punch, port, targets, sink)
            async for stream in source:  # all at once: where there are two, each side may see another one first
                nursery.start_soon(greet, stream)
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
        try:
            if not await _is_the_other(side, stream):
                return 0.0
            await _until_both_know(side)
            return took
        finally:
            stream.close()


async def _punch(port: PunchPort, targets: Sequence[Candidate], sink: trio.MemorySendChannel[ByteStream]) -> None:
    async with sink:
        await port.run(targets, sink)


async def _is_the_other(side: Side, stream: ByteStream) -> bool:
    with trio.move_on_after(side.patience_s), suppress(trio.BrokenResourceError):
        await stream.send_all(b"x")
        return await stream.receive_some(1) == b"x"
    return False


async def _until_both_know(side: Side) -> None:
    side.words.put("heard")
    await side.hear()


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


def gets_through(site: NatSite, left: NatKind, right: NatKind, how: Callable[[Side], Awaitable[float]]) -> bool:
    """At the first attempt, on a machine that is not very busy; each is at ports of its own."""
    count = ATTEMPTS if possible_directly(left, right) else 1
    return any(attempt(site, left, right, how) > 0 for _ in range(count))


@pytest.mark.parametrize(("left", "right"), [*itertools.combinations_with_replacement(PUNCHED, 2)])
def test_tcp_gets_through_every_pair_but_a_symmetric_nat_and_one_that_filters_by_port(
    site: NatSite, left: NatKind, right: NatKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    if possible_directly(left, right):
        monkeypatch.setattr(punch, "PUNCH_TCP_S", ALL_TRIES_S)
    monkeypatch.setattr(punch, "READY_S", PATIENCE_S)
    assert gets_through(site, left, right, over_tcp) is possible_directly(left, right)


# aioice begins a check in the moment in which it is ended.
@pytest.mark.filterwarnings("ignore:coroutine 'Connection.check_start' was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("left", "right"), [*itertools.combinations_with_replacement(PUNCHED[:-1], 2)])
def test_udp_gets_through_the_same_pairs_unless_it_is_blocked(
    site: NatSite, left: NatKind, right: NatKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ice, "GATHER_S", PATIENCE_S)
    got_through = gets_through(site, left, right, over_udp)
    gc.collect()
    assert got_through is possible_directly(left, right)
