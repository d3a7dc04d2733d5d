"""When models were used last, with few writes."""

from meshmax.base.ids import Sha256
from meshmax.core.uses import MAX_USES, RESOLUTION_S, Uses

A, B = Sha256("a" * 64), Sha256("b" * 64)


def test_a_busy_model_changes_something_once_a_minute() -> None:
    uses = Uses()
    changes = 0
    for tenth in range(1200):
        uses.note(A, 1000 + tenth / 10)
        changes += uses.changed
        uses.changed = False
    assert changes == 2
    assert uses.items()[A] == 1000 + RESOLUTION_S


def test_when_it_came_counts_as_a_use() -> None:
    uses = Uses({A: 50.0})
    assert uses.last_s(A, since_s=10.0, now_s=100.0) == 50.0
    assert uses.last_s(A, since_s=60.0, now_s=100.0) == 60.0
    assert uses.last_s(B, since_s=60.0, now_s=100.0) == 60.0


def test_times_of_a_clock_that_was_wrong_count_only_where_there_is_no_other() -> None:
    uses = Uses({A: 9999.0})
    assert uses.last_s(A, since_s=10.0, now_s=100.0) == 10.0
    assert uses.last_s(A, since_s=500.0, now_s=100.0) == 9999.0


def test_a_clock_that_was_put_back_does_not_stop_the_noting() -> None:
    uses = Uses({A: 9999.0})
    uses.note(A, 100.0)
    assert uses.items()[A] == 100.0


def test_the_one_used_longest_ago_is_forgotten_first() -> None:
    uses = Uses({Sha256(f"{number:064x}"): float(number) for number in range(MAX_USES)})
    uses.note(A, 1e6)
    assert len(uses.items()) == MAX_USES
    assert Sha256(f"{0:064x}") not in uses.items()
    assert A in uses.items()
