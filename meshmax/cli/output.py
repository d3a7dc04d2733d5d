"""What the terminal shows: tables, times, durations and JSON, formatted as Ollama formats them.

Pure functions from values to text, except `emit*`, which write to standard output. Texts that other peers chose (names,
addresses) lose their control characters here, so that nobody can write escape sequences to somebody else's terminal.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from meshmax.base.units import NS_PER_S

_GAP: Final = "    "  # between columns, as Ollama
_FOREVER_YEARS: Final = 20  # an expiry further away than this means "never"
_DAY_H: Final = 24
_ANSWER_CONTROLS: Final = "\n\t"  # control characters that an answer may hold
_UNSAFE: Final = ("Cc", "Cs")  # categories: controls, among them ESC and CSI, and halves of characters
_NARROWEST: Final = ("Mn", "Me", "Cf")  # categories that take no column


def emit(text: str = "") -> None:
    """One line (or several) on standard output."""
    sys.stdout.write(text + "\n")


def emit_json(value: Any) -> None:
    """``value`` as indented JSON."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str, keep: str = "") -> str:
    """``text`` without control characters, except those in ``keep``."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c.isprintable() or c in keep)


def printable_answer(text: str) -> str:
    """A model's text, or an error's, as it may go to a terminal: escape sequences cannot form, all else stays.

    Only control characters go: blanks that are not ASCII's and joiners belong to the text (emoji, Persian, Japanese).
    """
    if text.isprintable():
        return text
    return "".join(c for c in text if c in _ANSWER_CONTROLS or unicodedata.category(c) not in _UNSAFE)


def columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes: East Asian letters and emoji two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in _NARROWEST else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, four spaces apart, without borders or trailing blanks."""
    lines = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(columns(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        _GAP.join(cell + " " * (width - columns(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def section(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A block of `show`: an indented title, then indented aligned rows."""
    lines = [[printable(cell) for cell in row] for row in rows]
    width = max((len(line[0]) for line in lines), default=0)
    body = ("    " + _GAP.join((line[0].ljust(width), *line[1:])).rstrip() for line in lines)
    return "\n".join((f"  {title}", *body))


def human_duration(seconds: float) -> str:
    """A length of time in words, as Ollama: ``4 minutes``, ``About an hour``, ``2 weeks``."""
    whole = int(seconds)
    minutes = whole // 60
    hours = round(seconds / 3600)
    if whole < 60:
        return "Less than a second" if whole < 1 else "1 second" if whole == 1 else f"{whole} seconds"
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    if hours < 2 * _DAY_H:
        return "About an hour" if hours == 1 else f"{hours} hours"
    for limit, unit, name in ((14, 1, "days"), (60, 7, "weeks"), (730, 30, "months")):
        if hours < limit * _DAY_H:
            return f"{hours // _DAY_H // unit} {name}"
    return f"{whole // 3600 // _DAY_H // 365} years"


def human_time(at_s: float | None, now_s: float, unknown: str = "Never") -> str:
    """A moment in Unix seconds, relative to now: ``2 days ago``, ``4 minutes from now``, ``Forever``."""
    if at_s is None:
        return unknown
    ago_s = now_s - at_s
    if -ago_s > _FOREVER_YEARS * 365 * 86400:
        return "Forever"
    return f"{human_duration(-ago_s)} from now" if ago_s < 0 else f"{human_duration(ago_s)} ago"


def parse_time_s(text: str) -> float | None:
    """Unix seconds of an RFC 3339 time with up to nanoseconds; None if it is missing, zero or not a time."""
    head, dot, rest = text.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    cut = head + (dot + rest[:digits][:6].ljust(6, "0") + rest[digits:] if dot else "")
    try:
        moment = datetime.fromisoformat(cut)
        return moment.timestamp() if moment.year > 1 else None
    except (ValueError, OverflowError):
        return None


def go_duration(ns: int) -> str:
    """Nanoseconds as Go prints them: ``1m2.5s``, ``340.1ms``, ``12µs``."""
    if ns < NS_PER_S:
        for unit, factor in (("ms", 10**6), ("µs", 10**3)):
            if ns >= factor:
                return _trimmed(ns / factor, 6) + unit
        return f"{ns}ns" if ns else "0s"
    hours, rest = divmod(ns, 3600 * NS_PER_S)
    minutes, rest = divmod(rest, 60 * NS_PER_S)
    seconds = _trimmed(rest / NS_PER_S, 9) + "s"
    return f"{hours}h{minutes}m{seconds}" if hours else f"{minutes}m{seconds}" if minutes else seconds


def _trimmed(value: float, places: int) -> str:
    return f"{value:.{places}f}".rstrip("0").rstrip(".")


def processor(size: int, size_vram: int) -> str:
    """Where a loaded model lies, as `ollama ps` says: ``100% GPU``, ``48%/52% CPU/GPU``."""
    if size_vram == 0:
        return "100% CPU"
    if size_vram == size:
        return "100% GPU"
    if size_vram > size or size == 0:
        return "Unknown"
    cpu = round((size - size_vram) / size * 100)
    return f"{cpu}%/{100 - cpu}% CPU/GPU"


def human_count(count: int) -> str:
    """Parameters as `ollama show` prints them: ``134.52M``, ``8.0B``."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor:
            return f"{count / factor:.{1 if unit == 'B' else 2 if unit == 'M' else 0}f}{unit}"
    return str(count)
