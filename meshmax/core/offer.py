"""Which of the wants for one blob's chunks a source serves now, and which it answers with Busy.

Rule. While a chunk is on its way to one peer, and for as long again as that peer will need to pass it on, it is not sent
to another: the other takes a chunk that nobody has got from us yet, and finds this one at the first peer, whose Have is
already on its way. So a source whose uplink is the bottleneck sends little more than one copy, whatever the number of
fetchers. A source that is quick sends at once to everybody. What is promised ends by itself after PROMISE_CHUNKS times
what a chunk takes us now, so a peer that dies or keeps to itself what it got delays others by that and no more.

Fed by whoever serves chunks: streams and lanes. Not here: in what order wants come up, the bytes, threads.
"""

from __future__ import annotations

from typing import Final

from meshmax.base.ids import PeerId
from meshmax.core.ewma import Ewma

PROMISE_CHUNKS: Final = (
    5.0  # a promise lasts this many times what sending a chunk takes: once to send it, then to spread
)
FIRST_PROMISE_S: Final = 1.0  # before anything was sent
MAX_PROMISE_S: Final = 30.0
QUICK_S: Final = 0.1  # shorter promises are not made: passing a chunk on by way of another peer takes about as long
MAX_PROMISES: Final = 4096  # chunks of one blob promised at once; the oldest are let go


class Offer:
    """What one source has promised of one blob."""

    __slots__ = ("_promises", "chunk_s")

    def __init__(self) -> None:
        self._promises: dict[int, tuple[PeerId, float]] = {}  # chunk -> whose it is, until when; oldest first
        self.chunk_s = Ewma()  # seconds from beginning to send a chunk to its end

    def ask(self, peer: PeerId, index: int, now: float) -> float:
        """We are about to send chunk ``index`` to ``peer``: 0.0 to do so, else Busy with these seconds."""
        self._expire(now)
        holder, until_s = self._promises.get(index, (peer, 0.0))
        if holder != peer and now < until_s:
            return until_s - now
        lasts_s = self._promise_s()
        if lasts_s >= QUICK_S:
            self._promises.pop(index, None)
            self._promises[index] = (peer, now + lasts_s)
        return 0.0

    def sent(self, took_s: float, now: float) -> None:
        """A chunk was sent, which took ``took_s`` from `ask` on, waiting for our bandwidth included."""
        self.chunk_s.add(took_s, now)

    def lost(self, peer: PeerId, index: int) -> None:
        """``peer`` did not get chunk ``index`` after all."""
        if self._promises.get(index, ("", 0.0))[0] == peer:
            del self._promises[index]

    def gone(self, peer: PeerId) -> None:
        """``peer`` left: what it got is nobody's any more."""
        for index in [index for index, (holder, _) in self._promises.items() if holder == peer]:
            del self._promises[index]

    def _promise_s(self) -> float:
        value = self.chunk_s.value
        return FIRST_PROMISE_S if value is None else min(PROMISE_CHUNKS * value, MAX_PROMISE_S)

    def _expire(self, now: float) -> None:
        while self._promises:
            oldest = next(iter(self._promises))
            if self._promises[oldest][1] > now and len(self._promises) < MAX_PROMISES:
                return
            del self._promises[oldest]
