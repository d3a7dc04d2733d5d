"""A simulated peer's word on its waits: nothing of the future is in it, and it is near what comes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import Sha256
from meshmax.testing.sim_waits import OTHERS, TOLD_EVERY_S, SimAnswer, SimWaits

CHAT = Sha256("a" * 64)


def answer(came_s: float, start_s: float, end_s: float, tokens: int, rate: float = 10.0) -> SimAnswer:
    said_from_s = max(start_s, end_s - tokens / rate)
    return SimAnswer(0, CHAT if tokens else OTHERS, came_s, start_s, said_from_s, end_s, tokens)


@given(st.integers(20, 400), st.integers(20, 400), st.floats(0.5, 1.9))
def test_how_long_an_answer_will_still_be_makes_no_difference_to_the_word(one: int, other: int, at_s: float) -> None:
    words = []
    for tokens in (one, other):
        waits = SimWaits(1)
        waits.on_taken(answer(0.0, 0.0, 0.5 + tokens / 10, tokens))
        words.append(waits.word(at_s))
    first, second = words
    assert first is not None
    assert second is not None
    assert first.wait_s == pytest.approx(second.wait_s)
    assert (first.free, first.queued) == (second.free, second.queued)


def test_what_comes_after_the_word_is_not_in_it() -> None:
    alone, together = SimWaits(1), SimWaits(1)
    for waits in (alone, together):
        waits.on_taken(answer(0.0, 0.0, 20.0, 190))
    together.on_taken(answer(1.1, 20.0, 30.0, 90))
    assert alone.word(1.05) == together.word(1.05)
    later = together.word(1.3)
    assert later is not None
    assert later.queued == 1


def test_who_asks_for_an_earlier_moment_gets_the_word_of_then() -> None:
    waits = SimWaits(2)
    first = waits.word(1.0)
    waits.on_taken(answer(1.1, 1.1, 9.0, 60))
    second = waits.word(1.0 + 2 * TOLD_EVERY_S)
    assert second is not None
    assert second.free == 1
    assert waits.word(1.1) == first
    assert waits.word(-1.0) is None


def test_after_a_restart_nothing_runs_and_nothing_is_known() -> None:
    waits = SimWaits(1)
    waits.on_taken(answer(0.0, 0.0, 50.0, 400))
    assert waits.word(1.0) is not None
    waits.on_restart(10.0)
    word = waits.word(10.5)
    assert word is not None
    assert (word.wait_s, word.free, word.queued) == (0.0, 1, 0)


def test_in_the_mean_the_word_is_what_comes() -> None:
    rng, waits = random.Random(5), SimWaits(2)
    free, told, real = [0.0, 0.0], [], []
    at_s = 0.0
    for _ in range(4000):
        at_s += rng.expovariate(1 / 6)
        word = waits.word(at_s)
        assert word is not None
        start_s = max(at_s, min(free))
        if not word.free:
            told.append(word.wait_s)
            real.append(start_s - at_s)
        tokens = max(8, int(rng.lognormvariate(4.2, 0.7)))
        end_s = start_s + 0.5 + tokens / 10
        free[free.index(min(free))] = end_s
        waits.on_taken(answer(at_s, start_s, end_s, tokens))
    assert len(told) > 500
    assert sum(told) / sum(real) == pytest.approx(1.0, abs=0.25)
