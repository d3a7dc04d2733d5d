from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.cli.answer import AnswerWriter, WordWrap, say_if_fetching, timings


def screen(written: str) -> str:
    """What a terminal shows after ``written``: the only sequence used erases a word to the left of the cursor."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+D\x1b\[K|\n)", written):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            count = int(part[2 : part.index("D")])
            lines[-1] = lines[-1][: len(lines[-1]) - count]
        else:
            lines[-1] += part
    return "\n".join(lines)


def wrapped(text: str, columns: int, piece: int) -> str:
    wrap = WordWrap(columns)
    return screen("".join(wrap.feed(text[at : at + piece]) for at in range(0, len(text), piece)))


def test_a_word_that_crosses_the_margin_moves_to_the_next_line() -> None:
    assert wrapped("the quick brown fox", columns=5 + 12, piece=1) == "the quick \nbrown fox"


def test_a_word_longer_than_a_line_is_cut_rather_than_moved() -> None:
    assert wrapped("x" * 25, columns=15, piece=4) == "\n".join(["x" * 10, "x" * 10, "x" * 5])


@given(st.text(alphabet="ab \n", max_size=200), st.integers(6, 40), st.integers(1, 7))
def test_wrapping_changes_only_line_ends_and_fits_whatever_the_pieces(text: str, columns: int, piece: int) -> None:
    shown = wrapped(text, columns, piece)
    assert shown.replace("\n", "") == text.replace("\n", "")
    assert all(len(line) <= columns - 5 for line in shown.split("\n"))
    assert shown == wrapped(text, columns, 1)


def writer(hide: bool = False, terminal: bool = False) -> tuple[AnswerWriter, list[str]]:
    out: list[str] = []
    return AnswerWriter(out.append, terminal, terminal, hide), out


def test_thinking_is_framed_and_ends_before_the_answer() -> None:
    writing, out = writer()
    writing.piece("", "hm")
    writing.piece("", ", well")
    writing.piece("Yes.", "")
    writing.end_thinking()
    assert "".join(out) == "Thinking...\nhm, well\n...done thinking.\n\nYes."
    assert (writing.text, writing.thought) == ("Yes.", "hm, well")


def test_hidden_thinking_is_kept_for_the_conversation_and_not_shown() -> None:
    writing, out = writer(hide=True)
    writing.piece("", "hm")
    writing.piece("Yes.", "")
    assert "".join(out) == "Yes."
    assert writing.thought == "hm"


def test_an_answer_cannot_send_escape_sequences_to_a_terminal_and_is_untouched_in_a_file() -> None:
    for terminal, expected in ((True, "[2Jhi\n"), (False, "\x1b[2Jhi\n")):
        writing, out = writer(terminal=terminal)
        writing.piece("\x1b[2Jhi\n", "")
        assert "".join(out) == expected


def test_timings_read_as_ollamas_and_then_tell_who_answered() -> None:
    final = {
        "total_duration": 10_706_818_083, "load_duration": 6_338_219_291, "prompt_eval_count": 26,
        "prompt_eval_duration": 130_079_000, "eval_count": 259, "eval_duration": 4_232_710_000,
    }  # fmt: skip
    assert timings(final, {"x-meshmax-peer": "12D3", "x-meshmax-route": "only holder"}) == (
        "total duration:       10.706818083s\n"
        "load duration:        6.338219291s\n"
        "prompt eval count:    26 token(s)\n"
        "prompt eval duration: 130.079ms\n"
        "prompt eval rate:     199.88 tokens/s\n"
        "eval count:           259 token(s)\n"
        "eval duration:        4.23271s\n"
        "eval rate:            61.19 tokens/s\n"
        "answered by:          12D3\n"
        "route:                only holder"
    )


def test_timings_leave_out_what_is_not_known() -> None:
    assert timings({}, {}) == ""


def test_wide_letters_are_wrapped_where_the_terminal_ends() -> None:
    wrap = WordWrap(10 + 5)
    assert wrap.feed("\u65e5\u672c \u65e5\u672c\u8a9e") == "\u65e5\u672c \u65e5\u672c\x1b[4D\x1b[K\n\u65e5\u672c\u8a9e"


def test_timings_tell_who_went_on_with_an_answer_and_that_its_words_may_differ() -> None:
    assert timings({"meshmax": {"peer": "12D3", "continued": True}}, {}) == "continued by:         12D3"
    assert "other words perhaps" in timings({"meshmax": {"peer": "12D3", "continued": True, "exact": False}}, {})


def test_who_waits_for_a_model_on_its_way_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetching = {"x-meshmax-route": "fetching m:latest to desk first"}
    say_if_fetching(fetching)
    assert capsys.readouterr().err == ""  # nobody reads it
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    say_if_fetching({"x-meshmax-route": "desk: loaded"})
    say_if_fetching(fetching)
    assert capsys.readouterr().err == "fetching m:latest to desk first (`meshmax transfers` shows how far it is)\n"
