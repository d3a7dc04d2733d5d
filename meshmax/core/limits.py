"""Which limits hold when: those of the configuration, those of its schedule, those set by command.

Rules: of the schedule's windows the first that the local time is in decides, for the directions that it names; the others are
as outside. A window that ends before it begins runs past midnight and belongs to the day on which it begins. What was set by
command wins until it is reset. Not here: the clock, keeping the limits (core.bucket).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from meshmax.base.config import LimitsConfig, LimitWindow
from meshmax.base.errors import ConfigError
from meshmax.base.units import parse_rate

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES_A_DAY: Final = 24 * 60
MAX_WINDOWS: Final = 64  # of a schedule; a person writes a handful

_HOURS: Final = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")


class Rates(msgspec.Struct, frozen=True):
    """Bytes a second, 0 for no limit: in all and for each peer, out (``up``) and in (``down``)."""

    up: int = 0
    down: int = 0
    peer_up: int = 0
    peer_down: int = 0


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was set by command; None: as configured."""

    up: int | None = None
    down: int | None = None
    peer_up: int | None = None
    peer_down: int | None = None


class _Window(msgspec.Struct, frozen=True):
    days: frozenset[int]
    begins: int  # minutes after midnight
    ends: int
    rates: Override

    def holds(self, weekday: int, minute: int) -> bool:
        return in_window(self.days, self.begins, self.ends, weekday, minute)


class Plan:
    """The configured limits, checked. Raises ConfigError that says what is accepted."""

    def __init__(self, config: LimitsConfig) -> None:
        self._always = Rates(*(parse_rate(text) for text in (config.up, config.down, config.peer_up, config.peer_down)))
        if len(config.schedule) > MAX_WINDOWS:
            raise ConfigError(f"limits.schedule has more than {MAX_WINDOWS} windows")
        self._windows = tuple(_window(window) for window in config.schedule)

    def at(self, weekday: int, minute: int, override: Override) -> Rates:
        """The limits at a local time: ``weekday`` 0 is Monday, ``minute`` counts from midnight."""
        rates = self._always
        window = next((window for window in self._windows if window.holds(weekday, minute)), None)
        for layer in (window.rates, override) if window else (override,):
            rates = _over(rates, layer)
        return rates


def in_window(days: frozenset[int], begins: int, ends: int, weekday: int, minute: int) -> bool:
    """Whether a local time is in the window: its days, and the minutes after midnight at which it begins and ends."""
    if begins < ends:
        return weekday in days and begins <= minute < ends
    yesterday = (weekday - 1) % len(DAYS)
    return (weekday in days and minute >= begins) or (yesterday in days and minute < ends)


def _over(rates: Rates, layer: Override) -> Rates:
    given = {key: value for key in Rates.__struct_fields__ if (value := getattr(layer, key)) is not None}
    return msgspec.structs.replace(rates, **given)


def _window(window: LimitWindow) -> _Window:
    begins, ends = parse_hours(window.hours)
    texts = (window.up, window.down, window.peer_up, window.peer_down)
    rates = Override(*(None if text is None else parse_rate(text) for text in texts))
    return _Window(parse_days(window.days), begins, ends, rates)


def parse_days(text: str) -> frozenset[int]:
    """Days as in ``mon-fri`` or ``sat,sun``; 0 is Monday. Raises ConfigError."""
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last and last not in DAYS):
            raise ConfigError(f"'{text[:80]}' are no days: write them like mon-fri or sat,sun")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days.update(day % len(DAYS) for day in range(begin, end + 1 if end >= begin else end + 1 + len(DAYS)))
    return frozenset(days)


def parse_hours(text: str) -> tuple[int, int]:
    """Hours as in ``08:00-18:00`` or ``22:00-06:00``, in minutes after midnight. Raises ConfigError."""
    match = _HOURS.fullmatch(text.replace(" ", ""))
    if match:
        begins, ends = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
        if int(match[2]) < 60 > int(match[4]) and begins < MINUTES_A_DAY >= ends and begins != ends:
            return begins, ends
    raise ConfigError(f"'{text[:80]}' are no hours: write them like 08:00-18:00, or 22:00-06:00 past midnight")
