"""What we sent and what a status can know of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.status import Load
from meshmax.core import outstanding as module
from meshmax.core.outstanding import Outstanding

HOME = PeerId("home")


def test_requests_sent_since_the_status_are_added_to_its_load() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_sent(HOME, 7)
    assert outstanding.count(HOME) == 2
    assert outstanding.load(HOME, 7, Load(1, 0, 2)) == Load(2, 1, 2)
    assert outstanding.load(HOME, 8, Load(2, 0, 2)) == Load(2, 0, 2)


def test_requests_that_ended_since_the_status_are_taken_off() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_ended(HOME, 7, 8)
    assert outstanding.load(HOME, 8, Load(1, 0, 1)) == Load(0, 0, 1)
    assert outstanding.load(HOME, 9, Load(1, 0, 1)) == Load(1, 0, 1)
    assert outstanding.count(HOME) == 0


def test_a_request_that_the_status_never_saw_leaves_no_trace() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_ended(HOME, 7, 7)
    assert outstanding.load(HOME, 7, Load(1, 0, 1)) == Load(1, 0, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60))
def test_the_count_is_of_what_is_under_way(steps: list[tuple[bool, int]]) -> None:
    outstanding, sequence = Outstanding(), 0
    open_: list[int] = []
    for send, ahead in steps:
        sequence += ahead
        if send or not open_:
            outstanding.on_sent(HOME, sequence)
            open_.append(sequence)
        else:
            outstanding.on_ended(HOME, open_.pop(0), sequence)
        assert outstanding.count(HOME) == len(open_)
        load = outstanding.load(HOME, sequence, Load(2, 1, 4))
        assert 0 <= load.running <= 4
        assert load.running + load.queued <= 3 + len(open_)


def test_how_many_may_wait_is_passed_on() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    assert outstanding.load(HOME, 7, Load(1, 0, 2, 9)) == Load(2, 0, 2, 9)


def test_peers_whose_status_is_behind_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 2)
    outstanding = Outstanding()
    for name in ("a", "b", "c"):
        outstanding.on_sent(PeerId(name), 1)
        outstanding.on_ended(PeerId(name), 1, 2)
    assert outstanding.load(PeerId("a"), 2, Load(1, 0, 1)) == Load(1, 0, 1)
    assert outstanding.load(PeerId("c"), 2, Load(1, 0, 1)) == Load(0, 0, 1)
