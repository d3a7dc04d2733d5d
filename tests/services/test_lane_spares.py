"""Lanes in stock: taken once, closed when nobody takes them, bounded."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.services.lane_spares import MAX_SPARES, SPARE_S, LaneSpares

A, B = PeerId("a"), PeerId("b")


class Stock:
    """An opener that counts."""

    per_peer = 2

    def __init__(self, takes_s: float = 0.05) -> None:
        self.takes_s = takes_s
        self.opened = self.open = 0
        self.error: Exception | None = None

    @asynccontextmanager
    async def open_lane(self, peer: PeerId) -> AsyncIterator[Any]:
        await trio.sleep(self.takes_s)
        if self.error:
            raise self.error
        self.opened += 1
        self.open += 1
        try:
            yield (peer, self.opened), None
        finally:
            self.open -= 1


@asynccontextmanager
async def open_spares(stock: Stock) -> AsyncIterator[LaneSpares]:
    async with trio.open_nursery() as nursery:
        yield LaneSpares(stock, nursery)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


async def test_a_prepared_lane_is_there_at_once_and_closed_by_its_taker(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock()
    async with open_spares(stock) as spares:
        spares.prepare(A, 2)
        await trio.sleep(1.0)
        began_s = trio.current_time()
        async with spares.open_lane(A) as (lane, _), spares.open_lane(A) as (other, _):
            assert trio.current_time() == began_s
            assert lane != other
            await trio.sleep(2 * SPARE_S)  # a taken one is no spare any more
            assert stock.open == 2
        await trio.testing.wait_all_tasks_blocked()
        assert (stock.open, stock.opened) == (0, 2)


async def test_one_that_is_on_its_way_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock(takes_s=1.0)
    async with open_spares(stock) as spares:
        spares.prepare(A, 1)
        await trio.sleep(0.6)
        began_s = trio.current_time()
        async with spares.open_lane(A):
            assert trio.current_time() - began_s == pytest.approx(0.4)
        assert stock.opened == 1


async def test_where_none_was_prepared_one_is_opened(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock()
    async with open_spares(stock) as spares:
        spares.prepare(A, 1)
        async with spares.open_lane(B) as (lane, _):
            assert lane[0] == B  # type: ignore[index]


async def test_one_that_nobody_takes_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock()
    async with open_spares(stock) as spares:
        spares.prepare(A, 2)
        await trio.sleep(SPARE_S + 1.0)
        assert (stock.open, stock.opened) == (0, 2)
        async with spares.open_lane(A):
            assert stock.opened == 3


async def test_why_one_failed_is_told_to_its_taker_alone(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock()
    stock.error = Busy("too many lanes")
    async with open_spares(stock) as spares:
        spares.prepare(A, 1)
        with pytest.raises(Busy, match="too many lanes"):
            async with spares.open_lane(A):
                pass
        spares.prepare(A, 1)
        await trio.sleep(1.0)  # nobody took that one, and nothing happened


async def test_spares_are_few_however_often_they_are_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock()
    async with open_spares(stock) as spares:
        for number in range(100):
            spares.prepare(PeerId(f"peer-{number % 20}"), 4)
        await trio.sleep(1.0)
        assert stock.open == MAX_SPARES


async def test_a_taker_that_gives_up_while_waiting_leaves_no_lane(autojump_clock: trio.testing.MockClock) -> None:
    stock = Stock(takes_s=1.0)
    async with open_spares(stock) as spares:
        spares.prepare(A, 1)
        with trio.move_on_after(0.1) as scope:
            async with spares.open_lane(A):
                pass
        assert scope.cancelled_caught
        await trio.sleep(2.0)
        assert stock.open == 0


@pytest.mark.parametrize("after_s", [None, 0.0, 0.05, 5.0, SPARE_S - 0.01, SPARE_S, SPARE_S + 0.01])
async def test_one_that_is_taken_at_whatever_moment_stays_open_for_its_taker(
    after_s: float | None, autojump_clock: trio.testing.MockClock
) -> None:
    stock = Stock()
    async with open_spares(stock) as spares:
        spares.prepare(A, 1)
        if after_s is not None:  # else its task has not begun
            await trio.sleep(after_s)
        async with spares.open_lane(A):
            await trio.sleep(2 * SPARE_S)
            assert stock.open == 1
