"""One fetch, event by event; and whole swarms with liars, deaths and stalls, held to what must always be true."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES, Haves
from meshmax.core import fetch
from meshmax.core.fetch import UNTRIED_SILENCE_S, Ban, Cancel, Demote, Done, Drop, Fetch, Request, Stuck
from meshmax.core.fetch_source import (
    BAN_STRIKES,
    FIRST_PATIENCE_S,
    FIRST_WINDOW,
    MAX_DEFER_S,
    MAX_REFUSALS,
    MAX_TIMEOUTS,
    MAX_WINDOW,
)
from tests.core.fetch_swarm import END_S, SimSource, Swarm, haves_of

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def new_fetch(count: int, have: set[int] | None = None) -> Fetch:
    return Fetch(haves_of(count, have or set()), random.Random(1))


def asked(actions: list[fetch.Action], peer: PeerId | None = None) -> list[int]:
    return [a.index for a in actions if isinstance(a, Request) and peer in (None, a.peer)]


def test_a_blob_that_is_whole_is_done_at_once_and_only_once() -> None:
    core = new_fetch(3, {0, 1, 2})
    assert core.start(0.0) == [Done()]
    assert core.on_source(A, Haves.all(3), 0.0) == []
    assert new_fetch(0).start(0.0) == [Done()]


def test_without_a_source_it_is_stuck_until_one_comes_that_has_something() -> None:
    core = new_fetch(3, {0})
    (stuck,) = core.start(0.0)
    assert isinstance(stuck, Stuck)
    assert core.on_source(A, haves_of(3, {0}), 0.0) == []
    assert core.snapshot().stuck
    assert asked(core.on_source(A, haves_of(3, {0, 1}), 1.0)) == [1]
    assert not core.snapshot().stuck
    actions = core.on_chunk_ok(A, 1, 10, 2.0)
    assert [type(a) for a in actions] == [Stuck]


def test_only_missing_chunks_are_asked_for() -> None:
    core = new_fetch(4, {0, 3})
    assert sorted(asked(core.on_source(A, Haves.all(4), 0.0))) == [1, 2]


def test_a_window_begins_small_and_grows_with_each_chunk_up_to_its_bound() -> None:
    core = new_fetch(1000)
    under_way = asked(core.on_source(A, Haves.all(1000), 0.0))
    assert len(under_way) == FIRST_WINDOW
    now = 0.0
    sizes = []
    for _ in range(2 * MAX_WINDOW):
        now += 0.001
        under_way += asked(core.on_chunk_ok(A, under_way.pop(0), CHUNK_BYTES, now))
        sizes.append(len(under_way))
    assert sizes[:3] == [3, 4, 5]
    assert max(sizes) == MAX_WINDOW


def test_a_slow_source_never_gets_more_than_two_chunks_ahead() -> None:
    core = new_fetch(1000)
    under_way = asked(core.on_source(A, Haves.all(1000), 0.0))
    now = 0.0
    for _ in range(20):
        now += 1.5
        under_way += asked(core.on_chunk_ok(A, under_way.pop(0), CHUNK_BYTES, now))
    assert len(under_way) == FIRST_WINDOW


def test_the_rarest_chunk_is_asked_for_first() -> None:
    core = new_fetch(10, set(range(2)))
    core.on_source(A, haves_of(10, {2}), 0.0)
    core.on_source(B, haves_of(10, {2}), 0.0)
    core.on_source_gone(A, 0.0)
    core.on_source_gone(B, 0.0)
    core = new_fetch(40)
    for peer in (A, B):
        core.on_source(peer, haves_of(40, set()), 0.0)
    core.on_have(A, haves_of(40, set(range(2, 40)) - {17}), 0.0)
    first = asked(core.on_source(C, haves_of(40, {3, 4, 17, 30}), 0.0), C)
    assert first[0] == 17


def test_equally_rare_chunks_are_taken_in_an_order_that_differs_between_fetchers() -> None:
    orders = set()
    for seed in range(8):
        core = Fetch(Haves.none(100), random.Random(seed))
        orders.add(tuple(asked(core.on_source(A, Haves.all(100), 0.0))))
    assert len(orders) > 4


def test_a_bad_chunk_is_asked_of_another_and_never_again_of_its_sender_even_after_it_came_back() -> None:
    core = new_fetch(1)
    assert asked(core.on_source(A, Haves.all(1), 0.0)) == [0]
    actions = core.on_chunk_bad(A, 0, 10, 1.0)
    assert actions[0] == Demote(A)
    assert isinstance(actions[1], Stuck)
    core.on_source_gone(A, 1.0)
    assert asked(core.on_source(A, Haves.all(1), 2.0)) == []
    assert asked(core.on_source(B, Haves.all(1), 2.0), B) == [0]
    assert Done() in core.on_chunk_ok(B, 0, 10, 3.0)
    view = core.snapshot()
    assert (view.sources[A].strikes, view.bytes_wasted) == (1, 10)


def test_a_demoted_source_gets_one_chunk_at_a_time_and_a_second_bad_chunk_bans_it() -> None:
    core = new_fetch(50)
    first, second = asked(core.on_source(A, Haves.all(50), 0.0))
    assert asked(core.on_chunk_bad(A, first, 10, 1.0)) == []  # the second is still under way
    actions = core.on_chunk_ok(A, second, 10, 2.0)
    assert len(asked(actions)) == 1
    actions = core.on_chunk_bad(A, asked(actions)[0], 10, 3.0)
    assert isinstance(actions[0], Ban)
    assert core.banned(A)
    (refused,) = core.on_source(A, Haves.all(50), 4.0)
    assert isinstance(refused, Ban)


def test_what_a_source_that_left_owed_is_asked_of_others() -> None:
    core = new_fetch(2)
    assert sorted(asked(core.on_source(A, Haves.all(2), 0.0))) == [0, 1]
    assert asked(core.on_source(B, Haves.all(2), 0.0)) == []
    assert sorted(asked(core.on_source_gone(A, 1.0), B)) == [0, 1]


def test_a_silent_source_loses_its_chunks_and_is_dropped_after_a_few_silences() -> None:
    core = new_fetch(2)
    core.on_source(A, Haves.all(2), 0.0)
    core.on_source(B, haves_of(2, set()), 0.0)
    assert core.deadline() == FIRST_PATIENCE_S
    actions = core.tick(FIRST_PATIENCE_S)
    assert {type(a) for a in actions} == {Cancel}
    assert sorted(asked(core.on_source(B, Haves.all(2), 10.0), B)) == [0, 1]
    now = FIRST_PATIENCE_S
    dropped: list[fetch.Action] = []
    core.on_chunk_ok(B, 0, 1, now)
    while not dropped:
        deadline_s = core.deadline()
        assert deadline_s is not None
        now = deadline_s
        dropped += [a for a in core.tick(now) if isinstance(a, Drop) and a.peer == A]
        core.on_part(B, now)
    assert len(dropped) == 1
    assert core.snapshot().sources[A].active is False
    assert now < 10 * MAX_TIMEOUTS * FIRST_PATIENCE_S


def test_a_blob_of_one_chunk_is_asked_of_another_when_the_first_says_nothing_for_a_second() -> None:
    core = new_fetch(1)
    assert asked(core.on_source(A, Haves.all(1), 0.0), A) == [0]
    assert asked(core.on_source(B, Haves.all(1), 0.0)) == []
    now = 0.0
    while not (actions := core.tick(now)):
        due_s = core.deadline()
        assert due_s is not None
        now = due_s
    assert asked(actions, B) == [0]
    assert UNTRIED_SILENCE_S <= now < FIRST_PATIENCE_S / 4
    assert core.on_chunk_ok(B, 0, 10, now) == [Cancel(A, 0), Done()]


def test_a_source_that_is_slow_but_sends_is_not_silent() -> None:
    core = new_fetch(2)
    core.on_source(A, Haves.all(2), 0.0)
    for second in range(1, 60):
        core.on_part(A, float(second))
        assert core.tick(second + 0.5) == []


def test_a_chunk_that_drips_for_ever_is_taken_away() -> None:
    core = new_fetch(1)
    core.on_source(A, Haves.all(1), 0.0)
    actions: list[fetch.Action] = []
    for second in range(1, 200):
        core.on_part(A, float(second))
        actions += core.tick(second + 0.5)
    assert Cancel(A, 0) in actions


def test_a_chunk_answered_with_busy_is_put_off_within_bounds_and_other_chunks_are_asked_for() -> None:
    core = new_fetch(3)
    first, second = asked(core.on_source(A, Haves.all(3), 0.0))
    (third,) = asked(core.on_busy(A, first, 5.0, 1.0))
    assert third not in (first, second)
    assert not core.stuck
    core.on_chunk_ok(A, second, 10, 2.0)
    assert asked(core.on_chunk_ok(A, third, 10, 3.0)) == []
    assert core.deadline() == 6.0
    assert asked(core.tick(6.0)) == [first]
    core.on_busy(A, first, 1e9, 7.0)
    assert core.deadline() == 7.0 + MAX_DEFER_S


def test_a_chunk_that_one_source_puts_off_is_asked_of_another() -> None:
    core = new_fetch(1)
    core.on_source(A, Haves.all(1), 0.0)
    assert asked(core.on_source(B, Haves.all(1), 0.0)) == []
    assert core.on_busy(A, 0, 5.0, 1.0) == [Request(B, 0)]


def test_a_source_that_is_busy_with_everything_is_left_alone_for_a_while() -> None:
    core = new_fetch(1000)
    under_way = asked(core.on_source(A, Haves.all(1000), 0.0))
    refused = 0
    while under_way:
        under_way += asked(core.on_busy(A, under_way.pop(0), 2.0, 1.0))
        refused += 1
    assert MAX_REFUSALS <= refused < MAX_REFUSALS + MAX_WINDOW
    assert core.deadline() == 3.0
    assert asked(core.tick(3.0))


def test_a_chunk_that_a_source_lacks_is_not_asked_of_it_until_it_offers_it_again() -> None:
    core = new_fetch(1)
    core.on_source(A, Haves.all(1), 0.0)
    assert asked(core.on_not_have(A, 0, 1.0)) == []
    assert core.stuck
    assert asked(core.on_have(A, Haves.all(1), 2.0)) == [0]


def test_a_relayed_source_is_asked_only_for_what_no_other_has_and_never_helps() -> None:
    core = new_fetch(6)
    assert asked(core.on_source(A, Haves.all(6), 0.0, 32), A) != []
    core = new_fetch(6)
    core.on_source(B, haves_of(6, {0, 1, 2, 3}), 0.0)
    actions = core.on_source(A, Haves.all(6), 0.0, 32)
    assert set(asked(actions, A)) == {4, 5}
    for index in (4, 5):
        assert asked(core.on_chunk_ok(A, index, CHUNK_BYTES, 1.0), A) == []
    assert asked(core.on_source_gone(B, 2.0), A) != []


def test_a_relayed_source_that_brought_its_share_counts_as_having_nothing_until_the_path_is_better() -> None:
    core = new_fetch(6)
    assert len(asked(core.on_source(A, Haves.all(6), 0.0, 1), A)) == 1
    (index,) = core._known[A].asked
    assert asked(core.on_path(A, 0, 0.5), A) == []
    actions = core.on_chunk_ok(A, index, CHUNK_BYTES, 1.0)
    assert any(isinstance(action, Stuck) for action in actions)
    assert core.stuck
    assert len(asked(core.on_path(A, None, 2.0), A)) == 2
    assert not core.stuck


def test_at_the_end_an_idle_fast_source_is_asked_too_and_the_loser_is_cancelled() -> None:
    core = new_fetch(10)
    for index in asked(core.on_source(A, haves_of(10, {0}), 0.0)):
        core.on_chunk_ok(A, index, CHUNK_BYTES, 0.1)  # A takes 0.1 s for a chunk
    slow = asked(core.on_source(B, haves_of(10, {1}), 0.1))
    assert slow == [1]
    core.on_have(A, Haves.all(10), 0.2)
    now = 0.2
    doubled: list[fetch.Action] = []
    while not doubled:
        view = core.snapshot()
        under_way = [i for i in range(10) if core.needs(i) and i != 1]
        if view.missing == 1:
            break
        now += 0.1
        for index in under_way[:1]:
            doubled += [a for a in core.on_chunk_ok(A, index, CHUNK_BYTES, now) if a == Request(A, 1)]
    while not doubled and now < 60:
        now += 0.3
        doubled += [a for a in core.tick(now) if a == Request(A, 1)]
    assert doubled == [Request(A, 1)]
    assert core.on_chunk_ok(A, 1, CHUNK_BYTES, now + 0.1) == [Cancel(B, 1), Done()]


def test_more_sources_than_the_bound_are_turned_away() -> None:
    core = new_fetch(1000)
    for number in range(fetch.MAX_SOURCES):
        core.on_source(PeerId(f"p{number}"), Haves.all(1000), 0.0)
    (turned_away,) = core.on_source(A, Haves.all(1000), 0.0)
    assert isinstance(turned_away, Drop)


def test_what_is_under_way_in_all_is_bounded() -> None:
    count = 2000
    core = new_fetch(count)
    under_way: dict[PeerId, list[int]] = {PeerId(f"p{n}"): [] for n in range(8)}
    now = 0.0
    for peer in under_way:
        under_way[peer] += asked(core.on_source(peer, Haves.all(count), now), peer)
    for _ in range(100):
        for peer, mine in under_way.items():
            now += 0.0005
            for action in core.on_chunk_ok(peer, mine.pop(0), CHUNK_BYTES, now) if mine else []:
                assert isinstance(action, Request)
                under_way[action.peer].append(action.index)
    assert sum(map(len, under_way.values())) == fetch.MAX_AHEAD
    assert max(map(len, under_way.values())) <= MAX_WINDOW


def test_a_blob_of_two_million_chunks_costs_milliseconds_an_event() -> None:
    count = 2 << 20
    core = new_fetch(count)
    under_way = asked(core.on_source(A, Haves.all(count), 0.0))
    core.on_source(B, Haves.all(count), 0.0)
    for step in range(100):
        under_way += asked(core.on_chunk_ok(A, under_way.pop(0), CHUNK_BYTES, 0.01 * step + 0.01), A)
    assert core.snapshot().missing == count - 100


@st.composite
def swarms(draw: st.DrawFn) -> Swarm:
    count = draw(st.integers(1, 80))
    number = draw(st.integers(2, 10))
    chosen = random.Random(draw(st.integers(0, 1 << 30)))
    sources = []
    for n in range(number):
        chunks = {i for i in range(count) if chosen.random() < chosen.choice([0.3, 0.7, 1.0])}
        source = SimSource(PeerId(f"peer{n}"), chunks, chosen.choice([0.01, 0.05, 0.3, 1.0]))
        if n < number // 2:
            match chosen.randrange(4):
                case 0:
                    source.dies_s = chosen.random() * 3
                case 1:
                    source.stalls_s = chosen.random() * 3
                case 2:
                    source.lies = chosen.choice([0.2, 1.0])
                case _:
                    source.dies_s, source.lies = chosen.random() * 5, 0.5
        else:
            source.busy_once = chosen.random() < 0.3
            source.gains = [(chosen.random() * 5, chosen.randrange(count)) for _ in range(3)]
        source.lacks = {i for i in chunks if chosen.random() < 0.05}
        sources.append(source)
    honest = [source for source in sources if source.honest]
    for index in range(count):  # an honest union has every chunk
        if not any(index in source.chunks - source.lacks for source in honest):
            keeper = chosen.choice(honest)
            keeper.chunks.add(index)
            keeper.lacks.discard(index)
    have = {i for i in range(count) if chosen.random() < 0.2}
    return Swarm(count, sources, chosen.randrange(1 << 30), have)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(swarms())
def test_it_completes_whenever_honest_sources_hold_every_chunk_whatever_the_others_do(swarm: Swarm) -> None:
    swarm.run()
    assert swarm.done_at_s is not None
    view = swarm.fetch.snapshot()
    assert view.missing == 0
    assert sum(source.chunks for source in view.sources.values()) == len(swarm.fetched)
    # One wasted chunk a strike; the end game and chunks that came after all add a bounded share.
    strikes = sum(source.strikes for source in view.sources.values())
    assert strikes == swarm.bad
    allowed = max(fetch.MIN_DOUBLES, swarm.count // fetch.DOUBLE_SHARE)
    assert view.bytes_wasted <= (strikes + allowed) * CHUNK_BYTES
    assert all(source.strikes <= BAN_STRIKES for source in view.sources.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30))
def test_a_stalled_source_does_not_hold_the_last_chunks(seed: int) -> None:
    chunks = set(range(40))
    fast = [SimSource(PeerId(f"fast{n}"), set(chunks), 0.02) for n in range(2)]
    stalled = SimSource(PeerId("stalled"), set(chunks), 0.02, stalls_s=0.2)
    swarm = Swarm(40, [*fast, stalled], seed)
    swarm.run()
    assert swarm.done_at_s is not None
    assert swarm.done_at_s < 4.0


def test_a_fetch_from_sources_that_lack_a_chunk_ends_stuck_and_not_for_ever_busy() -> None:
    swarm = Swarm(20, [SimSource(A, set(range(19)), 0.01)], 1)
    swarm.run()
    assert swarm.done_at_s is None
    assert swarm.fetch.stuck
    assert swarm.now < END_S
    assert swarm.fetch.snapshot().missing == 1


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_two_sources_are_nearly_twice_as_fast_as_one(count: int) -> None:
    def seconds(sources: int) -> float:
        swarm = Swarm(count, [SimSource(PeerId(f"p{n}"), set(range(count)), 0.1) for n in range(sources)], 5)
        swarm.run()
        assert swarm.done_at_s is not None
        return swarm.done_at_s

    assert seconds(2) <= seconds(1) * (0.75 if count > 8 else 1.25)
