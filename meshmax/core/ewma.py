"""An exponentially weighted mean of measurements that come at uneven times.

Rules: a sample weighs ALPHA against a fresh mean, more against an old one (the past halves in weight every HALF_LIFE_S),
so that a figure of yesterday gives way to one answer of today. Time is passed in. Not here: what is measured.
"""

from __future__ import annotations

import math
from typing import Final

ALPHA: Final = (
    0.3  # weight of a sample right after another: follows a change in about five answers, rides out one hiccup
)
HALF_LIFE_S: Final = 300.0  # seconds in which the past loses half its weight; machines change load over minutes


class Ewma:
    """A running mean. ``value`` is None before the first sample; ``at_s`` is when the last sample came."""

    __slots__ = ("at_s", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.at_s = -math.inf

    def add(self, sample: float, now: float) -> None:
        """Take a sample in; one that is not a finite number of 0 or more is ignored, since it was not measured well."""
        if not (math.isfinite(sample) and sample >= 0):
            return
        age_s = max(0.0, now - self.at_s)
        if self.value is None:
            self.value = sample
        else:
            past = (1 - ALPHA) * 0.5 ** (age_s / HALF_LIFE_S)
            self.value = past * self.value + (1 - past) * sample
        self.at_s = max(now, self.at_s)

    def age_s(self, now: float) -> float:
        """Seconds since the last sample; infinite before the first."""
        return max(0.0, now - self.at_s)
