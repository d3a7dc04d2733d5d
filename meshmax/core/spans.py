"""Spans: which bytes of a blob are there, as disjoint half-open intervals in order.

Sans-IO and mutable; one owner. Used where a blob's chunk map is not known yet, so that there is no bitmap of chunks.
Bounded by whoever adds to it: a download adds to as many places at once as it has connections.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Spans:
    """Intervals [start, end) in bytes. Touching ones are joined."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in spans:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self._ends) - sum(self._starts)

    @property
    def prefix(self) -> int:
        """How many bytes are there without a gap from the very beginning."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def add(self, start: int, end: int) -> int:
        """Add [start, end); how many of its bytes were not there before. An empty interval adds nothing."""
        if start >= end:
            return 0
        before = self.total
        first = bisect_left(
            self._ends, start
        )  # the first that ends at or after our start: it touches us or lies behind
        last = bisect_right(self._starts, end)  # the first that begins beyond our end
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        return self.total - before

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) is there."""
        at = bisect_right(self._starts, start) - 1
        return start >= end or (at >= 0 and self._ends[at] >= end)

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """What is missing of [start, end), in order."""
        found, at = [], start
        for have_start, have_end in self:
            if have_start >= end:
                break
            if have_start > at:
                found.append((at, have_start))
            at = max(at, have_end)
        if at < end:
            found.append((at, end))
        return found

    def copy(self) -> Spans:
        """The same, apart."""
        return Spans(self)
