"""One source of one blob: what it has, what is asked of it, how fast it is, how far it is trusted.

Rules. The window (chunks asked and not yet there) begins at FIRST_WINDOW, grows by one with each chunk that comes, halves
when nothing came in time, and never holds more than WINDOW_S worth of the source's measured rate: a slow source thus
never sits on chunks that a fast one could have brought. A chunk that it answered with Busy is put off, as long as it
says, and the others are asked for; one that answers nothing but Busy is left alone for a while. A source that sent a
bad chunk is asked one chunk at a time from then on. Silence is measured against the source's own rate. Not here:
choosing chunks (core.fetch_chunks), the blob as a whole (core.fetch).
"""

from __future__ import annotations

import heapq
from typing import Final

from meshmax.base.ids import PeerId
from meshmax.core.ewma import Ewma

FIRST_WINDOW: Final = 2  # chunks; one on the wire and one behind it, before anything is measured
MAX_WINDOW: Final = 64  # chunks of 1 MiB in flight a source: 800 MB/s with 80 ms of round trip and of our own delays
WINDOW_S: Final = 0.5  # seconds of a source's rate that a window may hold (2 chunks at least); longer than a round trip
SAMPLE_S: Final = 0.05  # the rate is measured over this at least, since what lanes bring is told in batches
MIN_CHUNK_S: Final = 1e-4  # no source is taken for quicker than that
FIRST_PATIENCE_S: Final = (
    10.0  # silence before anything is measured; a loaded peer may take seconds to open a cold file
)
MIN_PATIENCE_S: Final = 3.0  # silence of a measured source: longer than a garbage collection or a Wi-Fi roam
MAX_PATIENCE_S: Final = 30.0
PATIENCE_CHUNKS: Final = 8.0  # silence of a measured source, in times of one chunk
MAX_CHUNK_S: Final = 120.0  # one chunk altogether: under 9 kB/s a source is no source, however steadily it drips
MAX_TIMEOUTS: Final = 3  # silences in a row after which a source is given up
BAN_STRIKES: Final = 2  # bad chunks after which a source is banned from this blob
MIN_DEFER_S: Final = 0.1  # a chunk that was answered with Busy is not asked for again sooner
MAX_DEFER_S: Final = 60.0  # nor put off for longer, whatever the source says
MAX_REFUSALS: Final = 32  # Busy answers in a row after which a source is left alone; it may be steering many fetchers


class Source:
    """What `core.fetch` knows of one source.

    ``bad``: chunks it sent wrong. ``asked``: chunks asked of it, since when. ``leaving``: asked, then cancelled, not yet
    confirmed; they still fill the window, so that what a peer has to remember stays bounded. ``barred``: chunks that it
    is not to be asked for now, as a set in an integer: leaving, deferred, or sent wrong. ``allowance``: it is reached over a
    relay, and may be asked for so many chunks at once; None: it is not.
    """

    __slots__ = (
        "_deferred",
        "_refusals",
        "_sample_chunks",
        "_sample_s",
        "allowance",
        "asked",
        "bad",
        "barred",
        "bytes",
        "chunk_s",
        "chunks",
        "haves",
        "heard_s",
        "leaving",
        "paused_until_s",
        "peer",
        "strikes",
        "timeouts",
        "window",
    )

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.allowance: int | None = None
        self.bad = 0
        self.strikes = 0
        self.chunks = 0
        self.bytes = 0
        self.chunk_s = Ewma()
        self.begin()

    def begin(self) -> None:
        """It came, or came back: what it sent before stays known, what was asked before does not count."""
        self.haves = 0
        self.barred = self.bad
        self.asked: dict[int, float] = {}
        self.leaving: set[int] = set()
        self._deferred: list[tuple[float, int]] = []  # a heap of (until, chunk); MAX_REFUSALS and a window at most
        self._refusals = 0
        self.window = FIRST_WINDOW
        self.timeouts = 0
        self.paused_until_s = 0.0
        self.heard_s = 0.0
        self._sample_s = 0.0  # when the present sample of the rate began, and how many chunks came since
        self._sample_chunks = 0

    @property
    def useful(self) -> int:
        """The chunks that it can bring, as a set in an integer."""
        return self.haves & ~self.bad

    @property
    def askable(self) -> int:
        """The chunks that it may be asked for now: one that was cancelled not before that is confirmed."""
        return self.haves & ~self.barred

    def room(self, now: float) -> int:
        """How many more chunks it may be asked for now."""
        if now < self.paused_until_s:
            return 0
        limit = self._limit() if self.allowance is None else min(self._limit(), self.allowance)
        return limit - len(self.asked) - len(self.leaving)

    @property
    def spent(self) -> bool:
        """Whether it is reached over a relay and has brought what may come over it."""
        return self.allowance is not None and self.allowance <= 0

    def pace_s(self) -> float:
        """Seconds for one chunk as measured; the first patience if never measured."""
        return FIRST_PATIENCE_S if self.chunk_s.value is None else self.chunk_s.value

    def waits_s(self, now: float) -> float:
        """Seconds for one chunk as it looks now: its pace, or its silence if that is longer; never 0."""
        return max(self.pace_s(), now - self.heard_s if self.asked else 0.0, MIN_CHUNK_S)

    def due_s(self, now: float) -> float:
        """Seconds until one chunk more than it owes would be there, as it looks now."""
        return self.waits_s(now) * (len(self.asked) + len(self.leaving) + 1)

    def remaining_s(self, now: float) -> float:
        """Seconds until all that is asked of it will be there; for one that has fallen silent, at least its silence."""
        return max(self.pace_s() * len(self.asked), now - self.heard_s)

    def ask(self, index: int, now: float) -> None:
        """Chunk ``index`` is asked of it."""
        if not self.asked and not self.leaving:
            self.heard_s = self._sample_s = now
            self._sample_chunks = 0
        self.asked[index] = now

    def leave(self, index: int) -> None:
        """Chunk ``index`` is no longer wanted of it."""
        if self.asked.pop(index, None) is not None:
            self.leaving.add(index)
            self.barred |= 1 << index

    def settled(self, index: int, now: float) -> bool:
        """It said the last word about chunk ``index``; False if it was never asked for it."""
        known = index in self.asked or index in self.leaving
        self.asked.pop(index, None)
        if index in self.leaving:
            self.leaving.discard(index)
            self.barred &= ~(1 << index)
        self.heard_s = now
        return known

    def delivered(self, index: int, size: int, now: float) -> None:
        """A good chunk came."""
        if index in self.asked:
            self._measure(now)
        self.settled(index, now)
        self.chunks += 1
        self.bytes += size
        self.timeouts = self._refusals = 0
        self.window = min(MAX_WINDOW, self.window + 1)

    def struck(self, index: int) -> None:
        """It sent chunk ``index`` wrong: it is never asked for that chunk again."""
        self.bad |= 1 << index
        self.barred |= 1 << index
        self.strikes += 1

    def deferred(self, index: int, retry_after_s: float, now: float) -> None:
        """It will not send chunk ``index`` for ``retry_after_s``, within bounds; after MAX_REFUSALS it is left alone."""
        if not self.haves & ~self.barred & (1 << index):
            return
        heapq.heappush(self._deferred, (now + min(max(retry_after_s, MIN_DEFER_S), MAX_DEFER_S), index))
        self.barred |= 1 << index
        self._refusals += 1
        if self._refusals >= MAX_REFUSALS:
            self._refusals = 0
            self.paused_until_s = self._deferred[0][0]

    def wake(self, now: float) -> None:
        """Time passed: what was put off may be asked for again."""
        if self.paused_until_s and now >= self.paused_until_s:
            self.paused_until_s = 0.0
        while self._deferred and self._deferred[0][0] <= now:
            self.barred &= ~(1 << heapq.heappop(self._deferred)[1]) | self.bad

    def wakes_s(self) -> float | None:
        """When `wake` will change something; None if nothing is put off."""
        if self.paused_until_s:
            return self.paused_until_s
        return self._deferred[0][0] if self._deferred else None

    def silent(self, now: float) -> None:
        """Nothing came in time: ask less from now on."""
        self.timeouts += 1
        self.window = max(1, self.window // 2)
        self.heard_s = now

    def silence_ends_s(self) -> float | None:
        """When its silence will have lasted too long; None while it owes nothing."""
        if not self.asked:
            return self.heard_s + self._patience_s() if self.leaving else None
        oldest_s = min(self.asked.values())
        return min(self.heard_s + self._patience_s(), oldest_s + MAX_CHUNK_S * len(self.asked))

    def _measure(self, now: float) -> None:
        self._sample_chunks += 1
        took_s = now - self._sample_s
        if took_s >= SAMPLE_S or self.chunk_s.value is None:
            self.chunk_s.add(took_s / self._sample_chunks, now)
            self._sample_s, self._sample_chunks = now, 0

    def _patience_s(self) -> float:
        value = self.chunk_s.value
        base_s = FIRST_PATIENCE_S if value is None else max(MIN_PATIENCE_S, PATIENCE_CHUNKS * value)
        return min(MAX_PATIENCE_S, base_s * float(2**self.timeouts))

    def _limit(self) -> int:
        if self.strikes:
            return 1
        value = self.chunk_s.value
        return min(self.window, max(FIRST_WINDOW, int(WINDOW_S / value))) if value else self.window
