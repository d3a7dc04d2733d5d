"""Which range is asked for next, and when a server is given up."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.core.ranges import CONNECTIONS, MAX_ROUNDS, PART_BYTES, STALL_BYTES, STALL_S, STEAL_BYTES, STUCK_S, Range
from meshmax.core.ranges import RangePlan as Plan
from meshmax.core.spans import Spans

NOW = 100.0


def plan_of(size: int, have: list[tuple[int, int]] | None = None) -> Plan:
    return Plan(size, Spans(have or []), random.Random(1), NOW)


def taken(plan: Plan, now: float = NOW) -> list[Range]:
    found = []
    while (part := plan.take(now)) is not None:
        found.append(part)
    return found


def bring(plan: Plan, part: Range, now: float = NOW) -> None:
    plan.on_written(part, plan.wanted(part, part.left), now)
    plan.on_ended(part)


def test_parts_are_asked_first_to_last_over_a_bounded_number_of_connections() -> None:
    plan = plan_of(100 * PART_BYTES)
    parts = taken(plan)
    assert [part.start for part in parts] == [index * PART_BYTES for index in range(CONNECTIONS)]
    assert {part.left for part in parts} == {PART_BYTES}


def test_what_is_there_is_never_asked_for() -> None:
    plan = plan_of(3000, [(0, 1000), (1500, 3000)])
    (part,) = taken(plan)
    assert (part.at, part.end) == (1000, 1500)
    bring(plan, part)
    assert plan.done
    assert taken(plan) == []


def test_an_empty_blob_is_done_at_once() -> None:
    assert plan_of(0).done


def test_an_idle_connection_takes_half_of_the_largest_rest() -> None:
    plan = plan_of(PART_BYTES)
    first = plan.take(NOW)
    second = plan.take(NOW)
    assert first is not None
    assert second is not None
    assert (first.end, second.start, second.end) == (PART_BYTES // 2, PART_BYTES // 2, PART_BYTES)
    rest = taken(plan)
    assert len(rest) == CONNECTIONS - 2
    assert max(part.left for part in (first, second, *rest)) == PART_BYTES // CONNECTIONS
    assert all(part.left >= STEAL_BYTES for part in (first, second, *rest))


def test_what_was_given_to_another_is_not_wanted_any_more() -> None:
    plan = plan_of(PART_BYTES)
    first = plan.take(NOW)
    assert first is not None
    plan.on_written(first, 1000, NOW)
    assert plan.take(NOW) is not None
    assert plan.wanted(first, PART_BYTES) == first.left < PART_BYTES - 1000


def test_a_failure_makes_a_pause_that_grows_with_each_round() -> None:
    plan, now, pauses = plan_of(1000), NOW, []
    while not plan.given_up(now):
        part = plan.take(now)
        if part is None:
            now = plan.deadline(now)
            continue
        plan.on_failed(part, "broken", now)
        pauses.append(plan.deadline(now) - now)
    assert len(pauses) == MAX_ROUNDS + 1
    assert all(later > earlier for earlier, later in zip(pauses, pauses[2:], strict=False))
    assert plan.reason == "broken"


def test_many_connections_that_break_at_once_are_one_round() -> None:
    plan = plan_of(CONNECTIONS * PART_BYTES)
    for part in taken(plan):
        plan.on_failed(part, "broken", NOW)
    assert not plan.given_up(NOW)
    assert plan.take(NOW) is None
    assert len(taken(plan, NOW + 1.0)) == CONNECTIONS


def test_bytes_between_failures_begin_the_count_anew() -> None:
    plan, now = plan_of(1 << 20), NOW
    for _ in range(5 * MAX_ROUNDS):
        part = plan.take(now)
        assert part is not None
        plan.on_written(part, 10, now)
        plan.on_failed(part, "broken", now)
        now = plan.deadline(now)
    assert not plan.given_up(now)


def test_a_server_that_asks_for_patience_gets_it_and_fewer_connections() -> None:
    plan = plan_of(CONNECTIONS * PART_BYTES)
    parts = taken(plan)
    plan.on_failed(parts[-1], "busy", NOW, retry_after_s=20.0)
    assert plan.take(NOW + 19.0) is None
    for part in parts[:-1]:
        bring(plan, part, NOW + 5.0)
    assert plan.take(NOW + 21.0) is not None


def test_a_range_that_hardly_moves_is_stalled_and_costs_a_connection() -> None:
    plan = plan_of(CONNECTIONS * PART_BYTES)
    first, *others = taken(plan)
    plan.on_written(first, STALL_BYTES - 1, NOW + 1)
    assert first.stalls_at_s == NOW + STALL_S
    plan.on_written(first, 1, NOW + 2)
    assert first.stalls_at_s == NOW + 2 + STALL_S
    plan.on_stalled(first, NOW + 32)
    assert plan.take(NOW + 32) is None  # one connection less
    bring(plan, others[0], NOW + 32)
    again = plan.take(NOW + 32)
    assert again is not None
    assert again.start == STALL_BYTES


def test_a_server_that_drips_is_given_up() -> None:
    plan, now = plan_of(1 << 30), NOW
    part = plan.take(now)
    assert part is not None
    while not plan.given_up(now):
        now += 1.0
        plan.on_written(part, 100, now)
    assert now - NOW == STUCK_S


def test_a_server_without_ranges_is_asked_for_all_over_one_connection() -> None:
    plan = plan_of(2 * PART_BYTES, [(0, 10)])
    first, second, *rest = taken(plan)
    assert plan.on_whole_body(first)
    assert (first.at, first.end, first.whole) == (0, 2 * PART_BYTES, True)
    assert not plan.on_whole_body(second)
    for part in rest:
        plan.on_ended(part)
    assert plan.take(NOW) is None
    bring(plan, first)
    assert plan.done


def test_a_refused_range_makes_it_ask_for_all() -> None:
    plan = plan_of(1000, [(0, 10)])
    (part,) = taken(plan)
    plan.on_no_ranges(part)
    (whole,) = taken(plan)
    assert whole.whole
    assert (whole.at, whole.end) == (0, 1000)


def test_a_server_without_ranges_that_breaks_at_the_same_place_is_given_up() -> None:
    plan, now = plan_of(1 << 20), NOW
    while not plan.given_up(now):
        part = plan.take(now)
        if part is None:
            now = plan.deadline(now)
            continue
        if part.whole or plan.on_whole_body(part):
            plan.on_written(part, 1000, now)
            plan.on_failed(part, "broken", now)
    assert not plan.done
    assert plan.done_bytes == 1000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5 * PART_BYTES), st.randoms(use_true_random=False))
def test_whatever_happens_every_byte_is_fetched_once(size: int, chance: random.Random) -> None:
    plan = Plan(size, Spans([(size // 3, size // 2)]), chance, NOW)
    seen, now, active = Spans([(size // 3, size // 2)]), NOW, list[Range]()
    for _ in range(20_000):
        if plan.done:
            break
        now += 0.1
        active += taken(plan, now)
        assert len(active) <= CONNECTIONS
        if not active:
            now = max(now, plan.deadline(now))
            continue
        part = chance.choice(active)
        step = plan.wanted(part, chance.choice([1 << 20, 4 << 20, PART_BYTES]))
        assert seen.add(part.at, part.at + step) == step
        plan.on_written(part, step, now)
        if part.left <= 0:
            plan.on_ended(part)
        elif chance.random() < 0.05:
            plan.on_failed(part, "broken", now)
        else:
            continue
        active.remove(part)
    assert plan.done
    assert seen.covers(0, size)
