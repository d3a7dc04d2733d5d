"""When a peer that owes us a word is given up."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.liveness import LOOK_S, STUCK, Silence

TIMEOUT_S = 6.0


def given_up_after(
    heard_s: Sequence[float | None], looks_every_s: float = LOOK_S, timeout_s: float = TIMEOUT_S
) -> float:
    """Seconds after which it is over, where look after look this was heard last; the last of them holds for ever."""
    silence, now, count = Silence(timeout_s, 100.0), 100.0, 0
    while not silence.is_over:
        now += looks_every_s
        heard = heard_s[min(count, len(heard_s) - 1)]
        silence.on_look(None if heard is None else 100.0 + heard)
        count += 1
    return now - 100.0


@pytest.mark.parametrize("heard_s", [None, -50.0, 0.0])
def test_one_of_whom_nothing_comes_is_gone_after_the_timeout(heard_s: float | None) -> None:
    assert given_up_after([heard_s]) == TIMEOUT_S


def test_whatever_comes_from_it_begins_the_silence_anew() -> None:
    assert given_up_after([0.0] * 9 + [4.6]) == 4.5 + LOOK_S + TIMEOUT_S


def test_one_that_lives_and_never_says_the_word_is_given_up_all_the_same() -> None:
    assert given_up_after([LOOK_S * look for look in range(1, 1000)]) == STUCK * TIMEOUT_S


def test_time_in_which_we_did_not_look_does_not_count() -> None:
    silence = Silence(TIMEOUT_S, 0.0)
    for _ in range(4):
        silence.on_look(0.0)  # however much later than due
    assert silence.silent_s == silence.waited_s == 4 * LOOK_S
    assert given_up_after([0.0], looks_every_s=2.0) == TIMEOUT_S / LOOK_S * 2.0


@given(st.floats(0.01, 100.0))
def test_the_end_is_noticed_soon_after_it_is_due_whatever_the_timeout(timeout_s: float) -> None:
    look_s = Silence(timeout_s, 0.0).look_s
    assert look_s <= LOOK_S
    took_s = given_up_after([None], looks_every_s=look_s, timeout_s=timeout_s)
    assert timeout_s - 1e-5 <= took_s <= timeout_s + look_s + 1e-5
