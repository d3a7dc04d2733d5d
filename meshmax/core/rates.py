"""How often strangers are served: so many events a second for each source, and so many in all.

Rules: a source (a subnet, a PeerId) may come ``burst`` times at once and ``per_s`` times a second from then on; all together
``total_per_s``, with a burst of one second. What is refused counts for nobody. Of more than ``max_sources`` the one that was
silent longest is forgotten (and starts afresh), so a flood of sources meets the bound of all together. Time is passed in.
Not here: who counts as one source (core.subnets), what is done for it.
"""

from __future__ import annotations

from typing import Final

MAX_SOURCES: Final = 4096  # remembered at once, each about 200 bytes


class Rates:
    """Token buckets by source, and one over all."""

    __slots__ = ("_all", "_burst", "_max_sources", "_per_s", "_sources", "_total_per_s")

    def __init__(self, per_s: float, burst: float, total_per_s: float, max_sources: int = MAX_SOURCES) -> None:
        self._per_s, self._burst, self._total_per_s, self._max_sources = per_s, burst, total_per_s, max_sources
        self._sources: dict[
            str, tuple[float, float]
        ] = {}  # tokens and when they were counted, least recently seen first
        self._all = (total_per_s, 0.0)

    def take(self, source: str, now: float) -> bool:
        """Whether ``source`` is served once more now."""
        own = _refilled(self._sources.pop(source, (self._burst, now)), self._per_s, self._burst, now)
        everybody = _refilled(self._all, self._total_per_s, self._total_per_s, now)
        taken = own >= 1 and everybody >= 1
        self._sources[source] = (own - taken, now)
        self._all = (everybody - taken, now)
        if len(self._sources) > self._max_sources:
            del self._sources[next(iter(self._sources))]
        return taken

    @property
    def sources(self) -> int:
        """How many are remembered."""
        return len(self._sources)


def _refilled(counted: tuple[float, float], per_s: float, most: float, now: float) -> float:
    tokens, at = counted
    return min(most, tokens + max(0.0, now - at) * per_s)
