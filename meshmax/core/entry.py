"""How many prompts this node has under way for its own clients, wherever they are answered. Sans-IO.

Each holds a connection, its tasks and its body, so there is a bound: one prompt more is told to come again, at once. Batch
prompts leave a quarter of the places to interactive ones. When to come again follows from how long prompts took of late: after
half of that time half of those under way have ended. Not here: who waits for a model (core.fair_queue).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.errors import Busy
from meshmax.base.inference import Priority
from meshmax.core.ewma import Ewma
from meshmax.core.fair_queue import INTERACTIVE_SHARE, MAX_RETRY_S, MIN_RETRY_S, QUEUE_FULL

MAX_PROMPTS: Final = 768  # of the API's 1024 connections: the others are for status, metrics and whoever ends something


class Entry:
    """The places of one node. Owned by one task; every ``now`` is of one monotonic clock, in seconds."""

    __slots__ = ("_limit", "_took", "under_way")

    def __init__(self, limit: int = MAX_PROMPTS) -> None:
        self._limit = limit
        self._took = Ewma()
        self.under_way = 0

    def join(self, priority: Priority) -> None:
        """A prompt came. Raises Busy, and no place is taken then."""
        limit = self._limit - (self._limit // INTERACTIVE_SHARE if priority == "batch" else 0)
        if self.under_way >= limit:
            raise Busy(f"{QUEUE_FULL} ({self.under_way} are under way from this peer)", self.retry_after_s())
        self.under_way += 1

    def leave(self, begun_s: float, now: float) -> None:
        """A prompt that came at ``begun_s`` has ended, in whatever way."""
        self.under_way -= 1
        self._took.add(now - begun_s, now)

    def retry_after_s(self) -> float:
        """When one who is turned away now does well to come again."""
        took_s = self._took.value
        return MIN_RETRY_S if took_s is None else min(max(took_s / 2, MIN_RETRY_S), MAX_RETRY_S)
