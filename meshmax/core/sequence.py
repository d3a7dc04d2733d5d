"""The sequence of our own statuses: it grows with each issue, over restarts too, also where the clock was set back.

It follows the clock in milliseconds, so that a home that was lost costs nothing. What may have been issued before a restart
is known by a bound that is kept: no number above it is issued while it is the kept one, and after a restart the numbers
go on above it. It is moved RESERVED ahead at a time, which is how seldom it needs to be written. Not here: the file.
"""

from __future__ import annotations

from typing import Final

RESERVED: Final = 600_000  # numbers, of which the clock takes one a millisecond: ten minutes


class StatusSequence:
    """Numbers that grow. ``kept``: the bound that was kept last, 0 if none was."""

    __slots__ = ("_bound", "_last")

    def __init__(self, kept: int = 0) -> None:
        self._last = self._bound = max(kept, 0)

    def next(self, now_ms: int) -> int:
        """The next number, at Unix time ``now_ms``."""
        self._last = max(self._last + 1, now_ms)
        return self._last

    def to_keep(self, now_ms: int) -> int | None:
        """The bound to keep before the next number is told to anybody; None where the kept one will do."""
        wanted = max(self._last, now_ms)
        return wanted + RESERVED if wanted + RESERVED // 2 >= self._bound else None

    def kept(self, bound: int) -> None:
        """``bound`` is kept now."""
        self._bound = bound
