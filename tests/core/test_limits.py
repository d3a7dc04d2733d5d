"""core.limits."""

from __future__ import annotations

import pytest

from meshmax.base.config import LimitsConfig, LimitWindow
from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.core.limits import Override, Plan, Rates, parse_days, parse_hours

NOON = 12 * 60
MON, FRI, SAT = 0, 4, 5


def test_nothing_is_limited_unless_it_is_configured() -> None:
    assert Plan(LimitsConfig()).at(MON, NOON, Override()) == Rates()


def test_what_is_configured_holds_at_all_hours() -> None:
    plan = Plan(LimitsConfig(up="10MB/s", peer_down="500KB"))
    assert plan.at(SAT, 0, Override()) == Rates(up=10_000_000, peer_down=500_000)


def test_a_window_decides_for_the_directions_that_it_names() -> None:
    window = LimitWindow(days="mon-fri", hours="08:00-18:00", up="1MB/s")
    plan = Plan(LimitsConfig(up="10MB/s", down="20MB/s", schedule=(window,)))
    assert plan.at(FRI, NOON, Override()) == Rates(up=1_000_000, down=20_000_000)
    assert plan.at(SAT, NOON, Override()).up == 10_000_000
    assert plan.at(FRI, 18 * 60, Override()).up == 10_000_000


def test_the_first_window_that_holds_wins() -> None:
    windows = (LimitWindow(hours="12:00-13:00", up="off"), LimitWindow(up="1MB/s"))
    plan = Plan(LimitsConfig(schedule=windows))
    assert plan.at(MON, NOON, Override()).up == 0
    assert plan.at(MON, 14 * 60, Override()).up == 1_000_000


def test_a_window_past_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    plan = Plan(LimitsConfig(schedule=(LimitWindow(days="fri", hours="22:00-06:00", down="1MB"),)))
    assert plan.at(FRI, 23 * 60, Override()).down == 1_000_000
    assert plan.at(SAT, 5 * 60, Override()).down == 1_000_000
    assert plan.at(FRI, 5 * 60, Override()).down == 0
    assert plan.at(SAT, 23 * 60, Override()).down == 0


def test_what_was_set_by_command_wins() -> None:
    plan = Plan(LimitsConfig(up="10MB/s", schedule=(LimitWindow(up="1MB/s"),)))
    assert plan.at(MON, NOON, Override(up=0)).up == 0


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon", {0}),
        ("mon-fri", {0, 1, 2, 3, 4}),
        ("sat,sun", {5, 6}),
        ("fri-mon", {4, 5, 6, 0}),
        ("MON - sun", set(range(7))),
    ],
)
def test_days_are_read_as_people_write_them(text: str, days: set[int]) -> None:
    assert parse_days(text) == days


@pytest.mark.parametrize("text", ["", "someday", "mon-", "1-5", "mon--fri"])
def test_what_are_no_days_is_an_error_that_says_how_to_write_them(text: str) -> None:
    if text == "mon-":
        assert parse_days(text) == {0}
        return
    with pytest.raises(ConfigError, match="mon-fri"):
        parse_days(text)


@pytest.mark.parametrize("text", ["", "8-18", "08:00-08:00", "24:00-06:00", "08:60-09:00", "08:00-24:01"])
def test_what_are_no_hours_is_an_error_that_says_how_to_write_them(text: str) -> None:
    with pytest.raises(ConfigError, match="08:00-18:00"):
        parse_hours(text)


def test_a_day_may_end_at_24_o_clock() -> None:
    assert parse_hours("00:00-24:00") == (0, 1440)


def test_a_rate_below_ten_kilobytes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="10MB/s"):
        Plan(LimitsConfig(up="5KB/s"))
