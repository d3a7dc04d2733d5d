"""Waiting in a node's first moments for whom it has not met yet; in virtual time."""

from collections.abc import Callable

import trio
import trio.testing

from meshmax.base.discovery import RungReport
from meshmax.core.first_moments import BEGIN_S, FIRST_S
from meshmax.services.first_moments import FirstMoments
from meshmax.services.peer_news import MAX_WAITING

Clock = trio.testing.MockClock
ALONE = (RungReport("mdns", "off"),)
MDNS = (RungReport("mdns", "working"),)


class Watchers:
    def __init__(self) -> None:
        self.known: list[Callable[[], None]] = []

    def on_news(self) -> None:
        for on_news in self.known:
            on_news()


async def test_whoever_misses_something_has_it_the_moment_that_it_turns_up(autojump_clock: Clock) -> None:
    watchers, there = Watchers(), set[str]()
    moments = FirstMoments(lambda: MDNS, watchers.known.append)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(moments.wait, lambda: "model" in there)
        await trio.sleep(0.2)
        watchers.on_news()  # of somebody else
        await trio.sleep(0.2)
        there.add("model")
        watchers.on_news()
    assert 0.4 <= trio.current_time() - began < 0.5


async def test_what_does_not_turn_up_is_waited_for_until_the_first_moments_are_over(autojump_clock: Clock) -> None:
    moments = FirstMoments(lambda: MDNS, Watchers().known.append)
    began = trio.current_time()
    await trio.sleep(1)
    await moments.wait(lambda: False)
    assert FIRST_S <= trio.current_time() - began < FIRST_S + 0.1
    await moments.wait(lambda: False)
    assert trio.current_time() - began < FIRST_S + 0.1


async def test_where_there_is_nobody_to_be_met_nobody_waits(autojump_clock: Clock) -> None:
    moments = FirstMoments(lambda: ALONE, Watchers().known.append)
    began = trio.current_time()
    await moments.wait(lambda: False)
    assert trio.current_time() - began <= BEGIN_S
    await moments.wait(lambda: False)
    assert trio.current_time() - began <= BEGIN_S


async def test_one_more_than_may_wait_is_not_kept_and_who_leaves_makes_room(autojump_clock: Clock) -> None:
    moments = FirstMoments(lambda: MDNS, Watchers().known.append)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_WAITING):
            nursery.start_soon(moments.wait, lambda: False)
        await trio.testing.wait_all_tasks_blocked()
        await moments.wait(lambda: False)
        assert trio.current_time() == began
        nursery.cancel_scope.cancel()
    with trio.move_on_after(1) as scope:
        await moments.wait(lambda: False)
    assert scope.cancelled_caught


async def test_in_another_mesh_they_begin_anew(autojump_clock: Clock) -> None:
    moments = FirstMoments(lambda: MDNS, Watchers().known.append)
    await trio.sleep(10 * FIRST_S)
    assert moments.left_s() == 0.0
    moments.begin()
    assert moments.left_s() == FIRST_S
