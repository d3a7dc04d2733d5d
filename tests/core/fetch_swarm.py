"""A swarm in a heap of events: sources of every temper around one core.fetch.Fetch, which it holds to its promises."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES, Haves
from meshmax.core import fetch
from meshmax.core.fetch_source import BAN_STRIKES, MAX_WINDOW

END_S = 3600.0  # virtual time in which any fetch of these sizes must have ended


@dataclass
class SimSource:
    """A source: which chunks it says it has, seconds a chunk, and what is wrong with it."""

    peer: PeerId
    chunks: set[int]
    chunk_s: float
    lies: float = 0.0  # share of its chunks that are bad
    dies_s: float | None = None
    stalls_s: float | None = None  # from then on it says nothing
    lacks: set[int] = field(default_factory=set)  # offered, but not there
    gains: list[tuple[float, int]] = field(default_factory=list)  # (when, chunk)
    busy_once: bool = False
    queue: list[int] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    sent_bad: set[int] = field(default_factory=set)
    sending: bool = False
    gone: bool = False

    @property
    def honest(self) -> bool:
        """Whether it can be counted on."""
        return not self.lies and self.dies_s is None and self.stalls_s is None


def haves_of(count: int, chunks: set[int]) -> Haves:
    haves = Haves.none(count)
    for index in chunks:
        haves = haves.with_chunk(index)
    return haves


class Swarm:
    """Runs a fetch to its end and asserts on the way what must always hold."""

    def __init__(self, count: int, sources: list[SimSource], seed: int, have: set[int] | None = None) -> None:
        self.count = count
        self.random = random.Random(seed)
        self.sources = {source.peer: source for source in sources}
        self.fetch = fetch.Fetch(haves_of(count, have or set()), random.Random(seed + 1))
        self.now = 0.0
        self.done_at_s: float | None = None
        self.stuck = 0
        self.bad = 0
        self.fetched: list[int] = []
        self.requests = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def run(self) -> None:
        """Until it is done, or nothing more can happen."""
        self._perform(self.fetch.start(0.0))
        for source in self.sources.values():
            self._at(self.random.random() * 0.1, partial(self._join, source))
            if source.dies_s is not None:
                self._at(source.dies_s, partial(self._die, source))
            for when_s, index in source.gains:
                self._at(when_s, partial(self._gain, source, index))
        while self.done_at_s is None and self.now < END_S:
            deadline_s = self.fetch.deadline()
            if deadline_s is not None and (not self._events or deadline_s <= self._events[0][0]):
                assert deadline_s >= self.now - 1e-9 or self.fetch.tick(self.now) is not None
                self.now = max(self.now, deadline_s)
                self._perform(self.fetch.tick(self.now))
                new_s = self.fetch.deadline()
                assert new_s is None or new_s > self.now or self.done_at_s is not None, "a tick must move the deadline"
            elif self._events:
                self.now, _, event = heapq.heappop(self._events)
                event()
            else:
                return

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (max(when_s, self.now), self._order, event))

    def _join(self, source: SimSource) -> None:
        if not source.gone:
            self._perform(self.fetch.on_source(source.peer, haves_of(self.count, source.chunks), self.now))

    def _gain(self, source: SimSource, index: int) -> None:
        source.chunks.add(index)
        self._join(source)

    def _die(self, source: SimSource) -> None:
        source.gone = True
        source.queue.clear()
        self._perform(self.fetch.on_source_gone(source.peer, self.now))

    def _perform(self, actions: list[fetch.Action]) -> None:
        for action in actions:
            match action:
                case fetch.Request(peer=peer, index=index):
                    self._request(self.sources[peer], index)
                case fetch.Cancel(peer=peer, index=index):
                    self.sources[peer].cancelled.add(index)
                case fetch.Ban(peer=peer) | fetch.Drop(peer=peer):
                    self.sources[peer].gone = True
                    self.sources[peer].queue.clear()
                case fetch.Done():
                    assert self.done_at_s is None
                    assert sorted(self.fetched) == sorted(set(self.fetched))
                    self.done_at_s = self.now
                case fetch.Stuck():
                    self.stuck += 1
                case fetch.Demote(peer=peer):
                    assert len(self.sources[peer].sent_bad) == 1

    def _request(self, source: SimSource, index: int) -> None:
        self.requests += 1
        assert not source.gone, "asked a peer that is no source"
        assert index in source.chunks, "asked for what it does not have"
        assert index not in source.sent_bad, "asked again for what it sent bad"
        assert len(source.sent_bad) < BAN_STRIKES
        assert index not in source.queue
        assert len(source.queue) < MAX_WINDOW
        if source.busy_once:
            source.busy_once = False
            self._at(self.now + 0.01, lambda: self._busy(source, index))
            return
        source.queue.append(index)
        if not source.sending:
            self._serve(source)

    def _busy(self, source: SimSource, index: int) -> None:
        source.cancelled.discard(index)
        if not source.gone:
            self._perform(self.fetch.on_busy(source.peer, index, 0.5, self.now))

    def _serve(self, source: SimSource) -> None:
        if not source.queue or source.gone:
            source.sending = False
            return
        source.sending = True
        duration_s = source.chunk_s * (0.5 + self.random.random())
        self._at(self.now + duration_s / 2, lambda: self._half(source))

    def _half(self, source: SimSource) -> None:
        if self._silent(source) or not source.queue:
            source.sending = bool(source.queue) and self._silent(source)
            return
        index = source.queue[0]
        if index in source.cancelled:
            self._last_word(source, index)
            self._perform(self.fetch.on_cancelled(source.peer, index, 0, self.now))
            self._serve(source)
            return
        if index in source.lacks:
            self._last_word(source, index)
            source.chunks.discard(index)
            self._perform(self.fetch.on_not_have(source.peer, index, self.now))
            self._serve(source)
            return
        self.fetch.on_part(source.peer, self.now)
        self._at(self.now + source.chunk_s / 2, lambda: self._whole(source, index))

    def _whole(self, source: SimSource, index: int) -> None:
        if self._silent(source) or not source.queue or source.queue[0] != index:
            return
        self._last_word(source, index)
        if not self.fetch.needs(index):
            self._perform(self.fetch.on_chunk_double(source.peer, index, CHUNK_BYTES, self.now))
        elif self.random.random() < source.lies:
            source.sent_bad.add(index)
            self.bad += 1
            self._perform(self.fetch.on_chunk_bad(source.peer, index, CHUNK_BYTES, self.now))
        else:
            self.fetched.append(index)
            self._perform(self.fetch.on_chunk_ok(source.peer, index, CHUNK_BYTES, self.now))
        self._serve(source)

    def _last_word(self, source: SimSource, index: int) -> None:
        source.queue.remove(index)
        source.cancelled.discard(index)

    def _silent(self, source: SimSource) -> bool:
        return source.gone or (source.stalls_s is not None and self.now >= source.stalls_s)
