"""A limit in bytes per second, kept by reserving: who wants to move bytes learns how long to wait first.

Rules: reservations are served in their order, each byte after those reserved before it. Who comes late by up to CREDIT_S is
taken to have come in time, so that a busy machine does not move less than it may; no more than that is saved up. Over any
span thus no more than rate times (span + CREDIT_S) and one reservation moves. A change of the rate holds for what was
reserved already, too. Time is passed in. Not here: what the rates are (core.limits), waiting.
"""

from __future__ import annotations

from typing import Final

CREDIT_S: Final = 0.2  # 2 % of the ten seconds over which a limit is to be held


class Bucket:
    """``rate_bytes_per_s`` 0: no limit."""

    __slots__ = ("_free_s", "rate_bytes_per_s")

    def __init__(self, rate_bytes_per_s: int = 0) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self._free_s = 0.0  # when all that was reserved will have moved

    def reserve(self, size_bytes: int, now: float) -> float:
        """Seconds to wait before ``size_bytes`` may move; they count from now on."""
        if not self.rate_bytes_per_s:
            return 0.0
        start_s = max(now - CREDIT_S, self._free_s)
        self._free_s = start_s + size_bytes / self.rate_bytes_per_s
        return max(0.0, start_s - now)

    def set_rate(self, rate_bytes_per_s: int, now: float) -> None:
        """From now on this rate; what is still owed at the old one is owed at the new one."""
        owed_bytes = max(0.0, self._free_s - now) * self.rate_bytes_per_s
        self.rate_bytes_per_s = rate_bytes_per_s
        self._free_s = now + owed_bytes / rate_bytes_per_s if rate_bytes_per_s else 0.0
