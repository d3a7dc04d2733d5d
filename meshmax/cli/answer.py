"""How an answer is written: thinking, words wrapped at the terminal's width, and the timings of ``--verbose``.

Not here: asking (run, chat).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from meshmax.base.units import NS_PER_S
from meshmax.cli.output import columns, go_duration, printable, printable_answer

_MARGIN: Final = 5  # columns kept free at the right
_ERASE_WORD: Final = "\x1b[{columns}D\x1b[K"  # back over a word that no longer fits, then clear to the end of the line


class WordWrap:
    """Wraps text that comes in pieces: a word that crosses the margin is erased and begun again on the next line."""

    __slots__ = ("_column", "_width", "_word")

    def __init__(self, width: int) -> None:
        """``width`` of the terminal in columns."""
        self._width = max(width - _MARGIN, 1)
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> str:
        """What to write for the next piece of text."""
        out: list[str] = []
        for character in text:
            if character == "\n":
                self._column, self._word = 0, ""
                out.append(character)
                continue
            wide = columns(character)
            if self._column + wide > self._width:
                out.append(self._break_before(character))
            out.append(character)
            self._column += wide
            self._word = "" if character == " " else self._word + character
        return "".join(out)

    def _break_before(self, character: str) -> str:
        word, wide = self._word, columns(self._word)
        if character == " " or not word or wide >= self._width:  # nothing to move, or it fits nowhere
            self._column, self._word = 0, ""
            return "\n"
        self._column = wide
        return _ERASE_WORD.format(columns=wide) + "\n" + word


class AnswerWriter:
    """Writes one answer piece by piece, thinking first. ``terminal``: the reader is a person."""

    def __init__(self, write: Callable[[str], object], terminal: bool, wrap: bool, hide_thinking: bool) -> None:
        """``write`` gets the text; pieces are shown as soon as they are there."""
        self._write = write
        self._terminal = terminal
        self._wrap = WordWrap(shutil.get_terminal_size().columns) if terminal and wrap else None
        self._hide_thinking = hide_thinking
        self._thinking = False
        self.text = ""
        self.thought = ""

    def piece(self, content: str, thinking: str) -> None:
        """The next piece of an answer."""
        self.thought += thinking
        self.text += content
        if thinking and not self._hide_thinking:
            if not self._thinking:
                self._write("Thinking...\n")
                self._thinking = True
            self._put(thinking)
        if content:
            self.end_thinking()
            self._put(content)

    def end_thinking(self) -> None:
        """Close the thinking part, if one is open."""
        if self._thinking:
            self._write("\n...done thinking.\n\n")
            self._thinking = False

    def _put(self, text: str) -> None:
        if self._terminal:
            text = printable_answer(text)
        self._write(self._wrap.feed(text) if self._wrap else text)


def write_out(text: str) -> None:
    """Write to standard output at once, without a line end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say_if_fetching(headers: Mapping[str, str]) -> None:
    """Tell a person who waits that a model is on its way, where the headers say so: there is no answer until it is there."""
    route = headers.get("x-meshmax-route", "")
    if route.startswith("fetching ") and sys.stderr.isatty():
        sys.stderr.write(f"{printable(route)} (`meshmax transfers` shows how far it is)\n")
        sys.stderr.flush()


def timings(final: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The lines of ``--verbose``: Ollama's figures, then who answered, why, and by which id `meshmax why` knows it."""
    lines = []
    for name, key in (("total duration", "total_duration"), ("load duration", "load_duration")):
        if ns := final.get(key):
            lines.append((name, go_duration(ns)))
    for name in ("prompt eval", "eval"):
        key = name.replace(" ", "_")
        count, ns = final.get(f"{key}_count"), final.get(f"{key}_duration")
        if count:
            lines.append((f"{name} count", f"{count} token(s)"))
        if ns:
            lines.append((f"{name} duration", go_duration(ns)))
            lines.append((f"{name} rate", f"{(count or 0) * NS_PER_S / ns:.2f} tokens/s"))
    for name, header in (("answered by", "x-meshmax-peer"), ("route", "x-meshmax-route"), ("request", "x-request-id")):
        if text := headers.get(header):
            lines.append((name, printable(text)))
    if moved := final.get("meshmax"):
        unsure = "" if moved.get("exact", True) else ", in other words perhaps than the first peer would have used"
        lines.append(("continued by", printable(str(moved.get("peer"))) + unsure))
    return "\n".join(f"{name + ':':<21} {text}" for name, text in lines)
