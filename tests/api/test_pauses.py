from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshmax.api.pauses import TICK_S, Pauses
from meshmax.core.write_pace import MAX_PAUSE_S


async def ends(pauses: Pauses, lengths_s: Sequence[float], begins_s: Sequence[float]) -> list[float]:
    """How long each of the pauses took, of those lengths and begun at those moments."""
    took = [0.0] * len(lengths_s)

    async def one(number: int) -> None:
        await trio.sleep(begins_s[number])
        began = trio.current_time()
        await pauses.wait(lengths_s[number], trio.Event())
        took[number] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for number in range(len(lengths_s)):
            nursery.start_soon(one, number)
    return took


@pytest.mark.parametrize("is_run", [True, False])
async def test_no_pause_takes_longer_than_was_asked_for_and_hardly_one_is_shorter(
    autojump_clock: MockClock, is_run: bool
) -> None:
    async with trio.open_nursery() as nursery:
        pauses = Pauses()
        if is_run:
            nursery.start_soon(pauses.run)
            await wait_all_tasks_blocked()
        took = await ends(pauses, [0.05] * 100, [0.0007 * number for number in range(100)])
        assert all(0.05 - TICK_S - 1e-9 <= each <= 0.05 + 1e-9 for each in took)
        nursery.cancel_scope.cancel()


async def test_a_shorter_pause_after_longer_ones_ends_within_the_longest(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pauses = Pauses()
        nursery.start_soon(pauses.run)
        await wait_all_tasks_blocked()
        took = await ends(pauses, [MAX_PAUSE_S, MAX_PAUSE_S, 0.017], [0.0, 0.01, 0.02])
        assert max(took) <= MAX_PAUSE_S + 1e-9
        nursery.cancel_scope.cancel()


async def test_a_pause_ends_when_it_is_hurried(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pauses, hurry, began = Pauses(), trio.Event(), trio.current_time()
        nursery.start_soon(pauses.run)
        await wait_all_tasks_blocked()
        hurry.set()
        await pauses.wait(0.05, hurry)
        assert trio.current_time() == began
        nursery.cancel_scope.cancel()


async def test_when_the_time_is_kept_no_more_all_pauses_end(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pauses, began = Pauses(), trio.current_time()
        nursery.start_soon(pauses.run)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as waiting:
            waiting.start_soon(pauses.wait, 0.05, trio.Event())
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
        assert trio.current_time() == began
