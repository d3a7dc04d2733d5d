"""Port mappings in the background, with routers in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from trio.testing import MockClock

from meshmax.base.errors import ConnectError
from meshmax.base.reachability import MappingProtocol
from meshmax.core.port_mapping import LIFETIME_S, SETTLE_S, PortWanted
from meshmax.services.port_mapping import END_S, PortMappingService, open_port_mapping
from meshmax.testing.memory_router import MemoryRouter

CONTROL, LANES, UDP = PortWanted("tcp", 11435), PortWanted("tcp", 11436), PortWanted("udp", 11435)
ALL = [CONTROL, LANES, UDP]


@asynccontextmanager
async def running(*routers: MemoryRouter, wanted: Sequence[PortWanted] = ALL) -> AsyncIterator[PortMappingService]:
    async with open_port_mapping(routers, lambda: wanted, Random(1)) as service:
        yield service


async def test_every_port_is_mapped_and_given_back_at_the_end(autojump_clock: MockClock) -> None:
    router, changes = MemoryRouter(), []
    async with running(router) as service:
        service.watch(lambda: changes.append(len(service.mappings)))
        await trio.sleep(1)
        assert router.table == {("tcp", 11435): 11435, ("tcp", 11436): 11436, ("udp", 11435): 11435}
        assert len(service.mappings) == 3
        assert service.external_port(LANES) == 11436
        assert changes[-1] == 3
    assert router.table == {}


async def test_mappings_are_renewed_for_days_and_that_is_no_news(autojump_clock: MockClock) -> None:
    router, changes = MemoryRouter(), []
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(1)
        service.watch(lambda: changes.append(1))
        await trio.sleep(86400)
        assert len(service.mappings) == 1
        assert not changes
        assert 86400 / LIFETIME_S < router.asked["add"] <= 2 * 86400 / LIFETIME_S + 2


async def test_nat_pmp_counts_before_upnp_and_upnp_where_it_is_alone(autojump_clock: MockClock) -> None:
    for there, by in ((True, "nat-pmp"), (False, "upnp")):
        pmp, upnp = MemoryRouter("nat-pmp"), MemoryRouter("upnp", answer_s=2)
        pmp.there = there
        async with running(pmp, upnp, wanted=[CONTROL]) as service:
            await trio.sleep(10)
            assert [mapping.by for mapping in service.mappings] == [by]


async def test_the_external_port_is_the_one_that_the_router_gives(autojump_clock: MockClock) -> None:
    router = MemoryRouter()
    router.shift = 1000
    async with running(router, wanted=[LANES]) as service:
        await trio.sleep(1)
        assert service.external_port(LANES) == 12436
    assert router.table == {}


async def test_a_taken_port_is_evaded(autojump_clock: MockClock) -> None:
    router = MemoryRouter("upnp")
    router.taken = {11435}
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(1)
        assert service.external_port(CONTROL) not in (0, 11435)


async def test_refusal_is_no_error_and_tried_again(autojump_clock: MockClock) -> None:
    router = MemoryRouter()
    router.refuses = "not today"
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(1)
        assert service.mappings == ()
        assert "not today" in service.why
        router.refuses = ""
        await trio.sleep(61)
        assert len(service.mappings) == 1


async def test_no_router_is_no_error_and_one_that_comes_is_found(autojump_clock: MockClock) -> None:
    router = MemoryRouter()
    router.there = False
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(300)
        assert "no router" in service.why
        router.there = True
        service.look_again()
        await trio.sleep(2)
        assert len(service.mappings) == 1


async def test_a_router_with_a_private_address_is_not_asked(autojump_clock: MockClock) -> None:
    router = MemoryRouter(external_ip="192.168.1.2")
    async with running(router) as service:
        await trio.sleep(10)
        assert router.asked["add"] == 0
        assert "another NAT" in service.why


async def test_what_is_wanted_follows_the_mesh(autojump_clock: MockClock) -> None:
    router, wanted = MemoryRouter(), list(ALL)
    async with running(router, wanted=wanted) as service:
        await trio.sleep(1)
        wanted.clear()
        service.check()
        await trio.sleep(1)
        assert router.table == {}
        assert service.mappings == ()


async def test_a_router_that_lost_its_memory_and_address_is_asked_anew(autojump_clock: MockClock) -> None:
    router = MemoryRouter()
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(1)
        router.table.clear()
        router.external_ip = "11.22.33.7"
        service.look_again()
        await trio.sleep(2)
        assert [mapping.external_ip for mapping in service.mappings] == ["11.22.33.7"]
        assert router.table == {("tcp", 11435): 11435}


async def test_a_router_that_is_silent_at_the_end_holds_nobody_up(autojump_clock: MockClock) -> None:
    router = MemoryRouter()
    async with running(router):
        await trio.sleep(1)
        router.answer_s = 3600
        begun_s = trio.current_time()
    assert trio.current_time() - begun_s <= END_S + 0.1


class SlowToTell(MemoryRouter):
    """It maps at once and says so late."""

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        granted = await super().add(protocol, port, external_port, lifetime_s)
        await trio.sleep(1.5)
        return granted


async def test_what_a_slow_router_maps_while_we_stop_is_given_back(autojump_clock: MockClock) -> None:
    router = SlowToTell()
    async with running(router, wanted=[CONTROL]) as service:
        await trio.sleep(1.0)
        assert router.table
        assert not service.mappings
        stopped_s = trio.current_time()
    assert router.table == {}
    assert trio.current_time() - stopped_s < 2 * END_S


async def test_a_router_that_never_says_what_it_maps_holds_nobody_up(autojump_clock: MockClock) -> None:
    router = SlowToTell(answer_s=1000)
    async with running(router, wanted=[CONTROL]):
        await trio.sleep(1001)
        assert router.asked["add"] == 1
        stopped_s = trio.current_time()
    assert trio.current_time() - stopped_s <= 2 * END_S


class Moves(MemoryRouter):
    """The router of the network that we are in, who takes ``answer_s``; one asked before we moved answers as if we had not, or
    not at all."""

    def __init__(self, silent: bool) -> None:
        super().__init__(answer_s=1.0)
        self.silent = silent
        self.found_ip = ""

    async def find(self) -> str:
        asked = self.external_ip
        await self._answered_by(asked, "find")
        self.found_ip = asked
        return asked

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        await self._answered_by(self.found_ip, "add")
        return external_port, lifetime_s

    async def _answered_by(self, asked: str, what: str) -> None:
        at_once = asked == self.external_ip
        await self._answer(what)
        if self.silent and asked != self.external_ip:
            raise ConnectError("the router does not answer")
        assert at_once or not self.silent


@pytest.mark.parametrize(
    "then", ["11.22.33.1", "11.22.33.9"]
)  # the same router, as where a cable was added; another one
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("at_s", [0.0, 0.5, 0.99, 1.01, 1.5, 1.99, 2.01, 10.0])
async def test_at_whatever_moment_our_network_changes_the_router_of_the_new_one_maps_our_ports_soon(
    at_s: float, silent: bool, then: str, autojump_clock: MockClock
) -> None:
    router = Moves(silent)
    async with running(router, wanted=[CONTROL, UDP]) as service:
        await trio.sleep(at_s)
        router.external_ip = then
        service.look_again()
        await trio.sleep(SETTLE_S + 2 * router.answer_s + 0.1)
        assert [mapping.external_ip for mapping in service.mappings] == [then] * 2
        await trio.sleep(300)
        assert [mapping.external_ip for mapping in service.mappings] == [then] * 2
