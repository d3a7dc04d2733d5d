from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.units import NS_PER_S
from meshmax.cli.output import (
    columns,
    go_duration,
    human_count,
    human_duration,
    human_time,
    parse_time_s,
    printable,
    printable_answer,
    processor,
    table,
)

M, H, D = 60, 3600, 86400


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (119, "About a minute"),
        (120, "2 minutes"), (59 * M, "59 minutes"), (H, "About an hour"), (89 * M, "About an hour"), (90 * M, "2 hours"),
        (47 * H, "47 hours"), (48 * H, "2 days"), (13 * D, "13 days"), (14 * D, "2 weeks"), (59 * D, "8 weeks"),
        (60 * D, "2 months"), (729 * D, "24 months"), (730 * D, "2 years"), (3650 * D, "10 years"),
    ],
)  # fmt: skip
def test_a_length_of_time_reads_as_ollama_writes_it(seconds: float, said: str) -> None:
    assert human_duration(seconds) == said


def test_a_moment_is_told_relative_to_now() -> None:
    assert human_time(1000.0, 1000 + 2 * D) == "2 days ago"
    assert human_time(1000.0 + 4 * M + 59, 1000.0) == "4 minutes from now"
    assert human_time(1000.0 + 100 * 365 * D, 1000.0) == "Forever"
    assert human_time(None, 1000.0) == "Never"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01T00:00:01.500000000Z", 1.5),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T01:00:01.123456789+01:00", 1.123456),
        ("0001-01-01T00:00:00Z", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_times_are_read_as_ollama_writes_them(text: str, expected: float | None) -> None:
    assert parse_time_s(text) == expected


@given(st.text(max_size=60))
def test_no_text_makes_reading_a_time_fail(text: str) -> None:
    assert isinstance(parse_time_s(text), float | None)


@pytest.mark.parametrize(
    ("ns", "said"),
    [
        (0, "0s"), (17, "17ns"), (12_300, "12.3µs"), (340_100_000, "340.1ms"), (NS_PER_S, "1s"), (1_234_567_891, "1.234567891s"),
        (62_500_000_000, "1m2.5s"), (3_661 * NS_PER_S, "1h1m1s"),
    ],
)  # fmt: skip
def test_durations_read_as_go_prints_them(ns: int, said: str) -> None:
    assert go_duration(ns) == said


@pytest.mark.parametrize(
    ("size", "vram", "said"),
    [
        (100, 0, "100% CPU"),
        (100, 100, "100% GPU"),
        (100, 52, "48%/52% CPU/GPU"),
        (100, 101, "Unknown"),
        (0, 1, "Unknown"),
    ],
)
def test_the_processor_column_reads_as_in_ollama_ps(size: int, vram: int, said: str) -> None:
    assert processor(size, vram) == said


@pytest.mark.parametrize(
    ("count", "said"), [(134_515_008, "134.52M"), (8_030_000_000, "8.0B"), (4_200, "4K"), (7, "7")]
)
def test_parameters_are_counted_as_in_ollama_show(count: int, said: str) -> None:
    assert human_count(count) == said


def test_columns_are_aligned_four_spaces_apart_without_trailing_blanks() -> None:
    assert table(("NAME", "ID"), [("a", "123"), ("longer", "4")]) == "NAME      ID\na         123\nlonger    4"


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("NAME", "SIZE"), []) == "NAME    SIZE"


@given(st.text())
def test_no_text_of_another_peer_brings_control_characters_to_the_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable_answer(text))


def test_a_name_with_an_escape_sequence_loses_it_in_a_table() -> None:
    assert "\x1b" not in table(("NAME",), [("evil\x1b[2J",)])


@pytest.mark.parametrize(
    "text", ["a\u00a0b", "\u3042\u3000\u3044", "\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f469", "1\u202f000"]
)
def test_an_answer_keeps_the_blanks_and_joiners_of_every_script(text: str) -> None:
    assert printable_answer(text) == text


def test_no_escape_sequence_forms_in_an_answer() -> None:
    assert printable_answer("\x1b[2Ja\x9b1mb\x07\r\ud800\n\tc") == "[2Ja1mb\n\tc"


def test_a_table_stands_straight_whatever_letters_are_in_it() -> None:
    assert columns("\u65e5\u672c e\u0301") == 6
    assert table(("N", "X"), [("\u65e5\u672c", "1"), ("abcd", "2")]).splitlines()[1:] == [
        "\u65e5\u672c    1",
        "abcd    2",
    ]
