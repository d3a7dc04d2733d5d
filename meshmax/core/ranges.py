"""Which range of a blob is asked of an HTTP server next, when one is tried again, and when the server is given up.

Rules: parts of PART_BYTES, first to last, over at most CONNECTIONS at once; when no part is left, an idle connection takes
the second half of the largest one under way. A failure makes a pause for everybody that doubles with each round in which
not a byte came (1, 2, 4 ... s); after MAX_ROUNDS of them, or STUCK_S in which hardly anything came, the server is given
up. A range that brings less than STALL_BYTES in STALL_S is stalled: its connection is dropped, its rest is asked anew,
and with one connection less. A server that knows no ranges is asked for the whole blob over one connection. What came is
never asked for again, but of such a server. Not here: HTTP, files, the digest (which decides at the end).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.units import KIB, MIB
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.spans import Spans

CONNECTIONS: Final = 8  # a public registry's CDN gives each connection a share; more look like abuse to some
PART_BYTES: Final = 32 * MIB  # a request a second at 256 Mbit/s on each connection
STEAL_BYTES: Final = MIB  # a rest that is smaller is not worth a connection of its own
STALL_S: Final = 30.0  # as Ollama's client has it
STALL_BYTES: Final = 64 * KIB  # 2 kB/s: whoever is slower than that is not there
STUCK_S: Final = 180.0  # nothing worth mention over all connections
MAX_ROUNDS: Final = 6  # of failures without a byte between: about a minute, as Ollama's client has it
FIRST_PAUSE_S: Final = 1.0
MOST_PAUSE_S: Final = 32.0
MOST_RETRY_AFTER_S: Final = 60.0  # a server that asks for more patience is given up after its rounds


class Range:
    """One range under way: [at, end) is still to come. Only the plan changes it."""

    __slots__ = ("at", "end", "mark_bytes", "mark_s", "start", "whole")

    def __init__(self, start: int, end: int, now: float, whole: bool = False) -> None:
        self.start = self.at = start
        self.end = end
        self.whole = whole  # asked without a Range header, from the first byte on
        self.mark_s = now
        self.mark_bytes = 0

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self.end - self.at

    @property
    def stalls_at_s(self) -> float:
        """When it counts as stalled unless more comes."""
        return self.mark_s + STALL_S


class RangePlan:
    """The plan of one blob of ``size`` bytes of which ``have`` is there."""

    def __init__(self, size: int, have: Spans, random: Random, now: float) -> None:
        self.size = size
        self._have = have.copy()
        self._random = random
        self._active: list[Range] = []
        self._limit = CONNECTIONS
        self._whole = False
        self._rounds = 0
        self._pause_until_s = now
        self._mark_s = now
        self._mark_bytes = 0
        self._reason = ""

    # --- questions ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether every byte is there."""
        return self._have.covers(0, self.size)

    @property
    def done_bytes(self) -> int:
        """Bytes that are there."""
        return self._have.total

    @property
    def reason(self) -> str:
        """Why the last range failed."""
        return self._reason

    def given_up(self, now: float) -> bool:
        """Whether the server is not to be asked any more."""
        return not self.done and (self._rounds > MAX_ROUNDS or now - self._mark_s >= STUCK_S)

    def deadline(self, now: float) -> float:
        """When `take` or `given_up` may answer otherwise although nothing has happened."""
        stuck_s = self._mark_s + STUCK_S
        return min(self._pause_until_s, stuck_s) if self._pause_until_s > now else stuck_s

    # --- ranges ------------------------------------------------------------------------------------------------------

    def take(self, now: float) -> Range | None:
        """A range to ask for now over a connection of its own; None: nothing to do, or a pause. End it with one `on_*`."""
        if self.done or now < self._pause_until_s or len(self._active) >= self._limit or self.given_up(now):
            return None
        found = Range(0, self.size, now, whole=True) if self._whole else self._missing(now) or self._stolen(now)
        if found is not None:
            self._active.append(found)
        return found

    def wanted(self, part: Range, size: int) -> int:
        """How many of the next ``size`` bytes belong to the range (its end may have been given to another)."""
        return min(size, max(part.left, 0))

    def on_written(self, part: Range, size: int, now: float) -> int:
        """The next ``size`` bytes of the range are in their place; how many of them are new."""
        new = self._have.add(part.at, part.at + size)
        part.at += size
        part.mark_bytes += size
        if part.mark_bytes >= STALL_BYTES:
            part.mark_bytes, part.mark_s = 0, now
        self._mark_bytes += size
        if new:  # a server without ranges sends what is here again, which is no step ahead
            self._rounds = 0
        if self._mark_bytes >= STALL_BYTES:
            self._mark_bytes, self._mark_s = 0, now
        return new

    def on_held(self, part: Range, now: float) -> None:
        """We ourselves held the range back until now, by our limits."""
        part.mark_s = self._mark_s = now

    def on_ended(self, part: Range) -> None:
        """The range came to its end."""
        self._active.remove(part)

    def on_whole_body(self, part: Range) -> bool:
        """The server answers with the whole blob, from its first byte; whether this connection is to read it."""
        if self._whole and not part.whole:
            self._active.remove(part)
            return False
        self._whole, self._limit = True, 1
        part.whole, part.start, part.at, part.end = True, 0, 0, self.size
        return True

    def on_no_ranges(self, part: Range) -> None:
        """The server refused a range (416): it may know none, so the whole is asked for."""
        self._whole, self._limit = True, 1
        self._active.remove(part)

    def on_stalled(self, part: Range, now: float) -> None:
        """The range has stalled."""
        self._active.remove(part)
        self._limit = max(1, self._limit - 1)
        self._reason = f"it sent less than {STALL_BYTES >> 10} KiB in {STALL_S:.0f} s"

    def on_failed(self, part: Range, reason: str, now: float, retry_after_s: float = 0.0) -> None:
        """The request failed, or broke off. ``retry_after_s``: what a busy server asked for."""
        self._active.remove(part)
        self._reason = reason
        if retry_after_s:
            self._limit = max(1, min(self._limit, len(self._active)))
        if now < self._pause_until_s:
            return  # one cause breaks many connections: that is one round
        self._rounds += 1
        pause_s = backoff_s(self._rounds, FIRST_PAUSE_S, MOST_PAUSE_S, self._random)
        self._pause_until_s = now + max(pause_s, min(retry_after_s, MOST_RETRY_AFTER_S))

    def _missing(self, now: float) -> Range | None:
        taken = self._have.copy()
        for part in self._active:
            taken.add(part.at, part.end)
        gaps = taken.gaps(0, self.size)
        if not gaps:
            return None
        start, end = gaps[0]
        return Range(start, min(end, start + PART_BYTES), now)

    def _stolen(self, now: float) -> Range | None:
        largest = max(self._active, key=lambda part: part.left, default=None)
        if largest is None or largest.left < 2 * STEAL_BYTES:
            return None
        middle = largest.at + largest.left // 2
        stolen = Range(middle, largest.end, now)
        largest.end = middle
        return stolen
