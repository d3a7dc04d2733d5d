"""How many datagrams of strangers are looked at: so many a second from each source, so many in all.

Looking at one costs a signature check (0.1 ms) and an answer; whoever sends more than his share is not answered, before
anything was spent on him. Who has proven that he is where he sends from shares a total with others who have: a flood from
made-up addresses takes nothing from them. Sources are remembered up to a bound, the one seen longest ago is forgotten first.
Answers to our own questions are not counted here. Time is passed in, in seconds.
"""

from __future__ import annotations

from typing import Final

RATE_PER_S: Final = 30.0  # a source; a busy look-up asks one node once or twice
BURST: Final = 90
TOTAL_RATE_PER_S: Final = 400.0  # of all who have proven their addresses, and of all others: 15 % of a core each
TOTAL_BURST: Final = 1200
MAX_SOURCES: Final = 4096


class _Tokens:
    __slots__ = ("burst", "left", "rate", "seen_s")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self.rate, self.burst, self.left, self.seen_s = rate, burst, burst, now_s

    def refill(self, now_s: float) -> float:
        self.left = min(self.burst, self.left + (now_s - self.seen_s) * self.rate)
        self.seen_s = now_s
        return self.left


class Arrivals:
    """Counts arrivals. ``scale`` multiplies every rate: a bootstrap node has more to answer."""

    __slots__ = ("_proven", "_scale", "_sources", "_total", "refused")

    def __init__(self, now_s: float, scale: float = 1.0) -> None:
        self._scale = scale
        self._total = _Tokens(TOTAL_RATE_PER_S * scale, TOTAL_BURST * scale, now_s)
        self._proven = _Tokens(TOTAL_RATE_PER_S * scale, TOTAL_BURST * scale, now_s)
        self._sources: dict[str, _Tokens] = {}
        self.refused = 0

    def take(self, source: str, now_s: float, *, proven: bool = False) -> bool:
        """Whether one more from ``source`` is looked at; ``proven``: it cannot be spoofed."""
        total = self._proven if proven else self._total
        tokens = self._sources.pop(source, None) or _Tokens(RATE_PER_S * self._scale, BURST * self._scale, now_s)
        self._sources[source] = tokens  # last: seen just now
        if len(self._sources) > MAX_SOURCES:
            del self._sources[next(iter(self._sources))]
        if tokens.refill(now_s) < 1 or total.refill(now_s) < 1:
            self.refused += 1
            return False
        tokens.left -= 1
        total.left -= 1
        return True
