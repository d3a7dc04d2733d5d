"""Sizes and durations as people write them."""

import pytest

from meshmax.base.errors import InvalidRequest
from meshmax.base.units import format_bytes, format_span, parse_duration_s, parse_span_s


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (4_661_211_808, "4.7 GB"),
        (13_000_000_000, "13 GB"),
        (98_362_432, "98 MB"),
    ],
)
def test_sizes_are_decimal_with_one_digit_below_ten(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300.0), ("1h30m", 5400.0), ("-1s", -1.0), ("0", 0.0), ("1.5h", 5400.0), ("100ms", 0.1)]
)
def test_go_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "1d", "5m!", "1" * 100 + "s", "--1s", "nan"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidRequest, match='write it like "5m"'):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), (" 7D ", 604800), ("2w", 1209600)]
)
def test_a_length_of_time_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_span_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "7", "d", "-1d", "1.5h", "7 d d", "9" * 30 + "s", "1y"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="write it like 90s, 30m, 12h, 7d or 2w"):
        parse_span_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (40, "40 s"),
        (57, "1 min"),
        (1000, "17 min"),
        (10800, "3 h"),
        (86400, "24 h"),
        (200_000, "2 days"),
    ],
)
def test_a_length_of_time_is_said_roughly(seconds: float, text: str) -> None:
    assert format_span(seconds) == text
