import itertools
from collections.abc import Callable
from typing import Any

import trio

from meshmax.base.ids import PeerId
from meshmax.net.announce import Announcer
from meshmax.ports import SwarmEvent

A, B = PeerId("a"), PeerId("b")


async def _read_for_a_second(events: trio.MemoryReceiveChannel[SwarmEvent], note: Callable[[SwarmEvent], None]) -> None:
    with trio.move_on_after(1):
        async for event in events:
            note(event)


async def test_a_slow_subscriber_sees_changes_that_cancel_out_as_none(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        announcer = Announcer(nursery)
        async with announcer.subscribe() as events:
            for _ in range(1000):
                announcer.connected(A)
                announcer.disconnected(A)
            announcer.connected(B)
            seen: list[tuple[PeerId, str]] = []
            await _read_for_a_second(events, lambda event: seen.append((event.peer_id, event.kind)))
        assert seen[-1] == (B, "connected")
        assert len(seen) <= 4
        of_a = [kind for peer, kind in seen if peer == A]
        assert of_a == ["connected", "disconnected"] * (len(of_a) // 2)


async def test_a_subscriber_never_misses_the_last_state(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        announcer = Announcer(nursery)
        announcer.connected(A)
        async with announcer.subscribe() as events:
            assert (await events.receive()).kind == "connected"
            announcer.disconnected(A)
            announcer.connected(A)
            announcer.disconnected(A)
            kinds: list[str] = []
            await _read_for_a_second(events, lambda event: kinds.append(event.kind))
            assert kinds[-1] == "disconnected"
            assert all(before != after for before, after in itertools.pairwise(kinds))


async def test_a_move_is_told_between_coming_and_going_and_to_nobody_who_looks_anyway(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        announcer = Announcer(nursery)
        announcer.moved(A)  # it is not connected: no news
        announcer.connected(A)
        async with announcer.subscribe() as events:
            kinds: list[str] = []
            await _read_for_a_second(events, lambda event: kinds.append(event.kind))
            assert kinds == ["connected"]
            for _ in range(1000):
                announcer.moved(A)
            await _read_for_a_second(events, lambda event: kinds.append(event.kind))
            assert kinds[:2] == ["connected", "moved"]
            assert len(kinds) <= 3  # one may have been on its way already
            kinds.clear()
            announcer.moved(A)
            announcer.disconnected(A)
            announcer.connected(A)
            announcer.moved(A)
            announcer.disconnected(A)
            await _read_for_a_second(events, lambda event: kinds.append(event.kind))
            assert kinds[-1] == "disconnected"
            assert len(kinds) <= 3


async def test_who_leaves_with_news_unread_breaks_nothing(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        announcer = Announcer(nursery)
        announcer.connected(A)
        async with announcer.subscribe():
            await trio.sleep(1)
        async with announcer.subscribe() as events:
            assert (await events.receive()).kind == "connected"


async def test_the_channel_ends_with_the_swarm(autojump_clock: Any) -> None:
    async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
        announcer = Announcer(nursery)

        async def read() -> None:
            async with announcer.subscribe() as events:
                assert [event async for event in events] == []

        outer.start_soon(read)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
