"""A ticket on its way: where its issuer is tried, how often, and what is said meanwhile."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import ConnectError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId, Ticket
from meshmax.ports import Sighting
from meshmax.services.joining import EARLY_PAUSE_S, EARLY_S, MAX_PAUSE_S, PATIENCE_S, SEARCH_S, Joining
from meshmax.testing.memory_swarm import SeededSigner

Clock = trio.testing.MockClock
ISSUER, NODE = SeededSigner(1).peer_id, SeededSigner(2).peer_id
BOOTSTRAP = f"/ip4/192.0.2.1/tcp/443/p2p/{NODE}"


def ticket(*bootstrap: str) -> Ticket:
    return Ticket(
        MeshId(ISSUER), "home", ISSUER, bytes(16), ("infer",), 10**10, ("/ip4/192.168.1.10/tcp/11435",), bootstrap
    )


class Way:
    """Reaches nobody."""

    def __init__(self) -> None:
        self.tried: list[tuple[float, tuple[str, ...]]] = []
        self.woken = trio.Event()

    async def reach(self, _peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self.tried.append((trio.current_time(), tuple(addresses)))
        raise ConnectError("No route to host")

    def wake(self) -> None:
        self.woken.set()
        self.woken = trio.Event()

    def pauses(self) -> list[float]:
        times = [at for at, _ in self.tried]
        return [later - before for before, later in zip(times, times[1:], strict=False)]  # noqa: RUF007  in words


@asynccontextmanager
async def on_its_way(way: Way, joining: Joining) -> AsyncIterator[trio.Nursery]:
    swarm: Any = None  # nobody is ever reached
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            joining.run, swarm, lambda _: (), lambda: 0.0, random.Random(1), lambda: way.woken, way.reach
        )
        yield nursery
        nursery.cancel_scope.cancel()


async def test_the_first_try_goes_over_the_bootstrap_nodes_of_the_ticket_too(autojump_clock: Clock) -> None:
    way, joining = Way(), Joining(ticket(BOOTSTRAP, "rubbish"), "b")
    async with on_its_way(way, joining):
        await trio.sleep(0.1)
        assert way.tried[0][1] == ("/ip4/192.168.1.10/tcp/11435", f"{BOOTSTRAP}/p2p-circuit")


@pytest.mark.parametrize(("bootstrap", "least_s"), [((), 0.0), ((BOOTSTRAP,), SEARCH_S)])
async def test_who_waits_is_told_of_failure_when_the_bootstrap_nodes_had_their_time(
    autojump_clock: Clock, bootstrap: tuple[str, ...], least_s: float
) -> None:
    way, joining = Way(), Joining(ticket(*bootstrap), "b")
    began = trio.current_time()
    async with on_its_way(way, joining):
        with trio.fail_after(SEARCH_S + EARLY_PAUSE_S):
            await joining.settled.wait()
        assert trio.current_time() - began >= least_s
        assert len(way.tried) == 1 or least_s


async def test_tries_come_often_at_first_and_the_next_one_is_told(autojump_clock: Clock) -> None:
    way, joining = Way(), Joining(ticket(), "b")
    async with on_its_way(way, joining):
        await trio.sleep(EARLY_S)
        assert max(way.pauses()) <= EARLY_PAUSE_S
        await trio.sleep(EARLY_S)
        assert EARLY_PAUSE_S < way.pauses()[-1] <= MAX_PAUSE_S
        before = joining.problem
        assert f"tried {len(way.tried)} times" in before
        assert "(next try in " in before
        await trio.sleep(1.0)
        assert joining.problem != before or "tried once" in before


async def test_another_network_begins_afresh(autojump_clock: Clock) -> None:
    way, joining = Way(), Joining(ticket(), "b")
    async with on_its_way(way, joining):
        await trio.sleep(3 * EARLY_S)
        count = len(way.tried)
        joining.look_again()
        way.wake()
        await trio.sleep(EARLY_PAUSE_S)
        assert len(way.tried) >= count + 4
        assert max(way.pauses()[count:]) <= EARLY_PAUSE_S


async def test_bootstrap_nodes_that_come_back_are_used_at_once(autojump_clock: Clock) -> None:
    class Silent:
        name, problem = "rendezvous", "no rendezvous node serves us"

        async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
            await trio.sleep_forever()

    way, joining, rung = Way(), Joining(ticket(), "b"), Silent()
    async with on_its_way(way, joining) as nursery:
        nursery.start_soon(joining.search, rung, way.wake)
        await trio.sleep(3 * EARLY_S)
        count = len(way.tried)
        rung.problem = ""
        await trio.sleep(EARLY_PAUSE_S)
        assert len(way.tried) >= count + 3


class Hanging(Way):
    """Nobody answers, and nobody refuses."""

    async def reach(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self.tried.append((trio.current_time(), tuple(addresses)))
        await trio.sleep_forever()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("at_s", [0.0, 0.5, 7.0, 14.9, 15.1])
async def test_at_whatever_moment_of_a_try_there_is_new_hope_the_next_one_follows_soon(
    named: bool, at_s: float, autojump_clock: Clock
) -> None:
    way, joining = Hanging(), Joining(ticket(), "b")
    send, receive = trio.open_memory_channel[Sighting](0)

    class Rung:
        name = "rendezvous"

        async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
            async for sighting in receive:
                await found.send(sighting)

    async with on_its_way(way, joining) as nursery:
        nursery.start_soon(joining.search, Rung(), way.wake)
        await trio.sleep(3 * EARLY_S)
        count = len(way.tried)
        while len(way.tried) == count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        began, count = way.tried[-1][0], len(way.tried)
        await trio.sleep_until(began + at_s)
        hope_s = trio.current_time()
        if named:
            await send.send(Sighting(ISSUER, ("/ip4/203.0.113.5/tcp/1",), "rendezvous"))
        else:
            joining.look_again()
            way.wake()
        while len(way.tried) == count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        at, addresses = way.tried[count]
        assert at - hope_s <= PATIENCE_S + 0.1
        assert not named or "/ip4/203.0.113.5/tcp/1" in addresses
