"""How long to wait before trying again: doubling, capped, with full jitter downwards to a half.

Jitter keeps peers that failed together from trying together (AWS Architecture Blog, "Exponential Backoff And Jitter").
"""

from __future__ import annotations

from typing import Protocol


class Random(Protocol):
    """The part of random.Random that cores use."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


def backoff_s(failures: int, first_s: float, most_s: float, random: Random) -> float:
    """Seconds to wait after ``failures`` (1 or more) failures in a row: between half and all of min(first * 2^n, most)."""
    ceiling = min(first_s * 2.0 ** min(failures - 1, 60), most_s)
    return ceiling * (0.5 + 0.5 * random.random())
