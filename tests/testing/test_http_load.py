from __future__ import annotations

from meshmax.testing.http_load import at_once, like_people


def test_people_begin_within_an_answers_time_and_pause_for_half_of_it_at_most() -> None:
    pause = like_people(2.0, seed=7)
    begins = [pause(True) for _ in range(1000)]
    pauses = [pause(False) for _ in range(1000)]
    assert 0 <= min(begins) < 0.1 and 1.9 < max(begins) <= 2
    assert 0 <= min(pauses) < 0.05 and 0.95 < max(pauses) <= 1


def test_the_same_people_come_at_the_same_moments() -> None:
    first, second = like_people(2.0, seed=7), like_people(2.0, seed=7)
    assert [first(True), first(False)] == [second(True), second(False)]
    assert like_people(2.0, seed=8)(True) != like_people(2.0, seed=7)(True)


def test_all_may_come_in_one_moment() -> None:
    assert at_once(True) == at_once(False) == 0
