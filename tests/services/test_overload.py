"""A peer that is asked ten times as much as it can answer: who is answered, who is turned away, and what that costs it."""

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
from trio.abc import Clock

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.base.inference import Finish, Priority
from meshmax.services.infer_client import open_remote_answer
from tests.services.infer_site import Node, Site, ask, open_site

SLOTS, ANSWER_S, MEMBERS, QUEUE = 4, 1.0, 10, 40
CAPACITY_PER_S = SLOTS / ANSWER_S
WORK = ask(" ".join(["word"] * 20))
RUN_S = 30.0


@dataclass
class Seen:
    """What clients saw of the requests sent after the first seconds."""

    done: Counter[tuple[PeerId, Priority]] = field(default_factory=Counter)
    waits: dict[Priority, list[float]] = field(default_factory=lambda: {"interactive": [], "batch": []})
    refused: list[tuple[float, float]] = field(default_factory=list)  # after how long, when to come again
    most_held: int = 0

    def percentile(self, priority: Priority, share: float) -> float:
        waits = sorted(self.waits[priority])
        return waits[int(share * (len(waits) - 1))]


async def request(site: Site, member: Node, priority: Priority, seen: Seen) -> None:
    begun = trio.current_time()
    asked = msgspec.structs.replace(WORK, priority=priority)
    try:
        async with open_remote_answer(member.swarm, site[0].peer_id, asked) as events:
            await anext(events)
            seen.waits[priority].append(trio.current_time() - begun)
            assert isinstance([event async for event in events][-1], Finish)
    except Busy as error:
        seen.refused.append((trio.current_time() - begun, error.retry_after_s))
        return
    seen.done[member.peer_id, priority] += 1


async def overload(site: Site, seen: Seen, times: float, greedy: dict[int, float]) -> None:
    """Each member sends on and on, whatever it hears; half of what it sends is batch. ``greedy``: who sends more than others."""
    until = trio.current_time() + RUN_S
    kinds: tuple[Priority, ...] = ("interactive", "batch")

    async def send(number: int) -> None:
        pause_s = MEMBERS / (times * CAPACITY_PER_S * greedy.get(number, 1.0))
        await trio.sleep(pause_s * number / MEMBERS)
        count = number
        while trio.current_time() < until:
            nursery.start_soon(request, site, site[1 + number], kinds[count % 2], seen)
            count += 1
            server = site[0].server
            seen.most_held = max(seen.most_held, server.active.total() - len(server.incoming))
            await trio.sleep(pause_s)

    async with trio.open_nursery() as nursery:
        for number in range(MEMBERS):
            nursery.start_soon(send, number)


@pytest.mark.parametrize("greedy", [{}, {0: 5.0, 1: 0.2}], ids=["alike", "one greedy, one modest"])
async def test_ten_times_too_much_is_answered_at_full_speed_fairly_and_in_bounded_time(
    autojump_clock: Clock, greedy: dict[int, float]
) -> None:
    seen = Seen()
    engine = {"parallel": SLOTS, "echo_tokens_per_s": 20.0, "max_queue": QUEUE, "max_queue_per_member": 8}
    async with open_site(1 + MEMBERS, **engine) as site:
        await overload(site, seen, 10.0, greedy)
        assert site[0].server.active.total() == site[0].residency.load().queued == 0
        assert site[0].server.held_bytes == 0
    took_s = RUN_S + QUEUE / CAPACITY_PER_S  # what waits at the end is answered, too
    assert seen.done.total() >= 0.95 * CAPACITY_PER_S * RUN_S
    assert seen.done.total() <= CAPACITY_PER_S * took_s

    interactive = Counter({peer: n for (peer, kind), n in seen.done.items() if kind == "interactive"})
    fair = interactive.total() / MEMBERS
    assert all(count == pytest.approx(fair, abs=0.1 * fair + 1) for count in interactive.values())
    batch = sum(n for (_, kind), n in seen.done.items() if kind == "batch")
    assert 0.1 <= batch / seen.done.total() <= 0.35  # an eighth while others wait, and what waited at the end

    assert seen.percentile("interactive", 1.0) <= QUEUE * ANSWER_S / SLOTS * 8 / 7 + 2 * ANSWER_S
    assert all(after_s <= 0.05 for after_s, _ in seen.refused)
    assert all(1.0 <= again_s <= QUEUE * ANSWER_S for _, again_s in seen.refused)
    assert (
        seen.most_held <= QUEUE + SLOTS + MEMBERS
    )  # places, slots, and those that hear at this moment that they are too many


async def test_below_its_capacity_nobody_is_turned_away(autojump_clock: Clock) -> None:
    seen = Seen()
    async with open_site(1 + MEMBERS, parallel=SLOTS, echo_tokens_per_s=20.0, max_queue=QUEUE) as site:
        await overload(site, seen, 0.8, {})
    assert not seen.refused
    assert seen.percentile("interactive", 1.0) <= 3 * ANSWER_S
