"""Which chunks are missing, who has them, and which of them to ask for next: rarest first.

Sets of chunks are integers (bit ``i`` is chunk ``i``), so that a blob of two million chunks costs microseconds a choice.
Chunks that equally many sources have share a level; a choice takes the lowest level with a chunk that fits, and within it
a random one, so that peers fetching the same blob at once take different chunks and soon have something to trade.
Not here: whom to ask and when (core.fetch).
"""

from __future__ import annotations

from meshmax.base.model import Haves
from meshmax.core.backoff import Random


def bits_of(haves: Haves) -> int:
    """``haves`` as a set in an integer; bits beyond the last chunk are dropped."""
    return int.from_bytes(haves.bits, "little") & ((1 << haves.count) - 1)


class Rarity:
    """How many sources have each chunk of one blob."""

    __slots__ = ("_count", "_levels", "_random")

    def __init__(self, count: int, random: Random) -> None:
        self._count = count
        self._levels = [(1 << count) - 1]  # level n: the chunks that exactly n sources have
        self._random = random

    def add(self, chunks: int) -> None:
        """One more source has ``chunks``."""
        for level in range(len(self._levels)):  # what is new is rare, so the lowest levels first
            if moved := self._levels[level] & chunks:
                if level + 1 == len(self._levels):
                    self._levels.append(0)
                self._levels[level] ^= moved
                self._levels[level + 1] |= moved
                chunks ^= moved
            if not chunks:
                return

    def remove(self, chunks: int) -> None:
        """One source fewer has ``chunks``, each of which it had."""
        for level in range(1, len(self._levels)):
            if moved := self._levels[level] & chunks:
                self._levels[level] ^= moved
                self._levels[level - 1] |= moved
                chunks ^= moved
        while len(self._levels) > 1 and not self._levels[-1]:
            self._levels.pop()

    def unheld(self) -> int:
        """The chunks that no source has."""
        return self._levels[0]

    def choose(self, among: int) -> int | None:
        """The rarest of the chunks ``among``, a random one of equals; None if ``among`` is empty."""
        for level in self._levels:
            if found := level & among:
                return self._any_of(found)
        return None

    def _any_of(self, chunks: int) -> int:
        start = int(self._random.random() * self._count)
        upper = chunks >> start
        if upper:
            return start + lowest(upper)
        return lowest(chunks)


def lowest(chunks: int) -> int:
    """The lowest chunk of a set that is not empty."""
    return (chunks & -chunks).bit_length() - 1
