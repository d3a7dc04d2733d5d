"""What is announced when: pace, renewal, withdrawal, backoff."""

import itertools
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.announce import (
    FIRST_RETRY_S,
    MAX_RETRY_S,
    MAX_WORDS,
    MOVED_NODES,
    PACE_S,
    RENEW_AFTER_S,
    TTL_S,
    Announcements,
    Word,
)

A, B, C = (Word("model", text) for text in "abc")


def take_all(core: Announcements, now: float, until: float, nodes: int = 8) -> list[tuple[float, Word, bool]]:
    """What is announced in the meantime, as a service would do it."""
    done = []
    while (at := core.deadline()) is not None and at <= until:
        now = max(now, at)
        found = core.tick(now)
        assert found is not None
        done.append((now, *found))
        core.on_announced(found[0], nodes, now)
    return done


def test_new_words_are_announced_at_once_one_at_a_time() -> None:
    core = Announcements(Random(1))
    core.on_provided([A, B, C], 100.0)
    assert take_all(core, 100.0, 110.0) == [
        (100.0, A, False),
        (100.0 + PACE_S, B, False),
        (100.0 + 2 * PACE_S, C, False),
    ]
    assert core.snapshot() == (3, 3)


def test_a_word_is_renewed_so_early_that_a_second_try_still_comes_in_time() -> None:
    core = Announcements(Random(1))
    core.on_provided([A], 0.0)
    times = [at for at, _, _ in take_all(core, 0.0, 2 * TTL_S)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert all(TTL_S / 3 < gap <= RENEW_AFTER_S for gap in gaps)
    assert len(gaps) >= 3


def test_what_is_gone_is_withdrawn_once_and_what_never_was_announced_is_not() -> None:
    core = Announcements(Random(1))
    core.on_provided([A], 0.0)
    take_all(core, 0.0, 1.0)
    core.on_provided([B], 10.0)
    core.on_provided([], 10.0)
    assert take_all(core, 10.0, 10 * TTL_S) == [(10.0, A, True)]
    assert core.deadline() is None


def test_what_comes_back_before_its_withdrawal_is_announced_anew() -> None:
    core = Announcements(Random(1))
    core.on_provided([A], 0.0)
    take_all(core, 0.0, 1.0)
    core.on_provided([], 10.0)
    core.on_provided([A], 11.0)
    assert take_all(core, 11.0, 20.0) == [(11.0, A, False)]


def test_an_announcement_that_nobody_took_is_tried_again_ever_more_seldom() -> None:
    core = Announcements(Random(1))
    core.on_provided([A], 0.0)
    times = [at for at, _, _ in take_all(core, 0.0, 4 * 3600.0, nodes=0)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert FIRST_RETRY_S / 2 <= gaps[0] <= FIRST_RETRY_S
    assert MAX_RETRY_S / 2 <= gaps[-1] <= MAX_RETRY_S
    assert core.snapshot() == (0, 1)


def test_other_addresses_make_everything_due() -> None:
    core = Announcements(Random(1))
    core.on_provided([A, B], 0.0)
    take_all(core, 0.0, 5.0)
    core.on_addresses(50.0)
    assert [word for _, word, _ in take_all(core, 50.0, 60.0)] == [A, B]


def test_a_word_that_moved_is_announced_to_the_nodes_that_came() -> None:
    core = Announcements(Random(1))
    core.on_provided([A, B], 0.0)
    take_all(core, 0.0, 5.0)
    core.on_moved(lambda word: MOVED_NODES if word == B else MOVED_NODES - 1, 50.0)
    assert [word for _, word, _ in take_all(core, 50.0, 60.0)] == [B]


def test_new_words_go_before_renewals() -> None:
    core = Announcements(Random(1))
    core.on_provided([A], 0.0)
    take_all(core, 0.0, 5.0)
    core.on_addresses(10.0)
    core.on_provided([A, B], 11.0)
    assert [word for _, word, _ in take_all(core, 11.0, 20.0)] == [B, A]


@given(st.lists(st.one_of(st.sets(st.integers(0, 20)), st.floats(0.0, TTL_S), st.just("moved")), max_size=30))
def test_no_sequence_of_events_breaks_the_pace_or_the_bound(events: list[set[int] | float | str]) -> None:
    core, now, last = Announcements(Random(1)), 0.0, -PACE_S
    for event in events:
        if isinstance(event, set):
            core.on_provided([Word("name", str(number)) for number in sorted(event)], now)
        elif isinstance(event, float):
            for at, _, _ in take_all(core, now, now + event):
                assert at - last >= PACE_S * 0.999
                last = at
            now += event
        else:
            core.on_addresses(now)


def test_more_words_than_the_bound_are_left_out() -> None:
    core = Announcements(Random(1))
    core.on_provided([Word("model", str(number)) for number in range(2 * MAX_WORDS)], 0.0)
    assert core.snapshot() == (0, MAX_WORDS)
