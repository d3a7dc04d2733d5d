"""Ports prepared ahead of attempts, in virtual time."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from meshmax.base.errors import ConnectError
from meshmax.services.spare_port import SPARE_S, open_spare_port
from meshmax.testing.memory_traversal import OBSERVED_S, MemoryNats, MemoryPunchPort

OBSERVERS = (("198.51.100.9", 443),)


def observers() -> tuple[tuple[str, int], ...]:
    return OBSERVERS


async def test_a_port_that_was_prepared_is_there_at_once_and_closed_with_its_taker(autojump_clock: Any) -> None:
    nats = MemoryNats()
    async with open_spare_port(nats.side("198.51.100.1"), observers) as spare:
        spare.prepare()
        spare.prepare()
        await trio.sleep(1.0)
        assert nats.open == 1
        began_s = trio.current_time()
        async with spare.open_port(OBSERVERS) as port:
            assert trio.current_time() == began_s
            assert port.candidates
            await trio.sleep(10 * SPARE_S)
            assert nats.open == 1
        await trio.testing.wait_all_tasks_blocked()
        assert nats.open == 0


async def test_one_on_its_way_is_waited_for(autojump_clock: Any) -> None:
    nats = MemoryNats()
    async with open_spare_port(nats.side("198.51.100.1"), observers) as spare:
        spare.prepare()
        await trio.sleep(OBSERVED_S / 2)
        began_s = trio.current_time()
        async with spare.open_port(OBSERVERS):
            assert trio.current_time() - began_s < 0.6 * OBSERVED_S


async def test_who_comes_second_while_the_spare_is_taken_gets_a_port_of_its_own(autojump_clock: Any) -> None:
    nats = MemoryNats()
    async with open_spare_port(nats.side("198.51.100.1"), observers) as spare:
        spare.prepare()
        async with spare.open_port(OBSERVERS) as one, spare.open_port(OBSERVERS) as other:
            assert one.candidates != other.candidates


async def test_one_that_nobody_takes_is_closed_and_another_can_be_prepared(autojump_clock: Any) -> None:
    nats = MemoryNats()
    async with open_spare_port(nats.side("198.51.100.1"), observers) as spare:
        spare.prepare()
        await trio.sleep(SPARE_S + 1.0)
        assert nats.open == 0
        spare.prepare()
        await trio.sleep(1.0)
        assert nats.open == 1
    assert nats.open == 0


async def test_one_of_another_network_or_with_other_observers_is_not_used(autojump_clock: Any) -> None:
    nats = MemoryNats()
    async with open_spare_port(nats.side("198.51.100.1"), observers) as spare:
        spare.prepare()
        await trio.sleep(1.0)
        spare.forget()
        await trio.testing.wait_all_tasks_blocked()
        assert nats.open == 0
        spare.prepare()
        await trio.sleep(1.0)
        began_s = trio.current_time()
        async with spare.open_port(()):
            assert trio.current_time() > began_s
            assert nats.open == 1


async def test_a_spare_that_fails_costs_nothing(autojump_clock: Any) -> None:
    nats = MemoryNats()
    side = nats.side("198.51.100.1")

    class FailsOnce:
        failed = False

        @asynccontextmanager
        async def open_port(self, asked: Sequence[tuple[str, int]]) -> AsyncIterator[MemoryPunchPort]:
            if not self.failed:
                self.failed = True
                raise ConnectError("no local port")
            async with side.open_port(asked) as port:
                yield port

    async with open_spare_port(FailsOnce(), observers) as spare:
        spare.prepare()
        async with spare.open_port(OBSERVERS) as port:
            assert port.candidates
