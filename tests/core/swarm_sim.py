"""A whole swarm in a heap of events: seeds and fetchers, each fetcher with a core.Fetch, each source with a core.Offer.

What is modelled: uplinks (chunks or parts of them, one after the other, the fetchers in turn), one latency, news of what a
node has that is sent at intervals, refusals, cancels in the middle of a chunk, nodes that join late, die, stall, lie, or
give nothing. What is not: downlinks, loss, processors.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES, Haves
from meshmax.core import fetch
from meshmax.core.offer import Offer

END_S = 100_000.0
LATENCY_S = 0.002  # one way, our own processing included
NEWS_S = 0.05  # between two words of a node on what it has; see services.blob_server
PARTS = 4  # as wire.blob cuts a chunk; what of it was sent before a cancel is wasted


@dataclass
class Temper:
    """How a node behaves. ``uplink_s``: seconds a chunk; ``joins_s``: when it begins; ``has``: chunks there before."""

    uplink_s: float
    joins_s: float = 0.0
    has: int = 0
    lies: float = 0.0
    dies_s: float | None = None
    stalls_s: float | None = None
    gives: bool = True  # False: takes and never serves
    hidden_from: frozenset[int] = frozenset()  # numbers of nodes that cannot reach it


@dataclass
class Node:
    """One peer. ``sent``: chunks that it put on the wire, parts counted."""

    number: int
    temper: Temper
    fetch: fetch.Fetch | None
    offer: Offer = field(default_factory=Offer)
    haves: int = 0
    queues: dict[int, deque[int]] = field(default_factory=dict)  # wants, by fetcher
    under_way: dict[int, tuple[int, int, float]] = field(default_factory=dict)  # by fetcher: chunk, parts sent, since
    cancelled: set[tuple[int, int]] = field(default_factory=set)
    turns: deque[int] = field(default_factory=deque)
    sending: bool = False
    free_s: float = 0.0
    sent: float = 0.0
    news_due: bool = False
    news_s: float = -1.0
    bad_to: dict[int, int] = field(default_factory=dict)
    done_s: float | None = None
    refusals: int = 0

    @property
    def peer(self) -> PeerId:
        """Its name."""
        return PeerId(f"n{self.number}")


class SwarmSim:
    """Runs to the end of all honest fetchers. ``shared``: parts take turns on an uplink, else whole chunks do."""

    def __init__(self, count: int, tempers: list[Temper], seed: int, shared: bool = True, steer: bool = True) -> None:
        self.count = count
        self.full = (1 << count) - 1
        self.random = random.Random(seed)
        self.shared, self.steer = shared, steer
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.calls = 0
        self.nodes = [self._node(number, temper) for number, temper in enumerate(tempers)]

    def _node(self, number: int, temper: Temper) -> Node:
        haves = temper.has
        core = None if haves == self.full else fetch.Fetch(self._as_haves(haves), random.Random(self.random.random()))
        return Node(number, temper, core, haves=haves)

    def run(self) -> SwarmSim:
        """Until every fetcher that does not die is done."""
        for node in self.nodes:
            if node.fetch:
                self._at(node.temper.joins_s, partial(self._join, node))
            if node.temper.dies_s is not None:
                self._at(node.temper.dies_s, partial(self._die, node))
        awaited = [n for n in self.nodes if n.fetch and n.temper.dies_s is None]
        while self.now < END_S and any(node.done_s is None for node in awaited):
            if not self._events:
                break
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self

    # --- what came of it ---

    @property
    def took_s(self) -> float:
        """Until the last honest fetcher had everything."""
        ends = [n.done_s for n in self.nodes if n.fetch and n.temper.dies_s is None]
        assert all(end is not None for end in ends), f"not done at {self.now}"
        return max(end for end in ends if end is not None)

    @property
    def wasted_share(self) -> float:
        """Bytes that came for nothing, in blobs, a fetcher."""
        cores = [n.fetch.snapshot() for n in self.nodes if n.fetch]
        return sum(v.bytes_wasted for v in cores) / CHUNK_BYTES / self.count / len(cores)

    def copies(self, number: int = 0) -> float:
        """How many times the blob left a node."""
        return self.nodes[number].sent / self.count

    # --- nodes ---

    def _as_haves(self, chunks: int) -> Haves:
        return Haves(self.count, chunks.to_bytes(-(-self.count // 8), "little"))

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (max(when_s, self.now), self._order, event))

    def _soon(self, event: Callable[[], None]) -> None:
        self._at(self.now + LATENCY_S * (0.5 + self.random.random()), event)

    def _alive(self, node: Node) -> bool:
        return node.temper.dies_s is None or self.now < node.temper.dies_s

    def _join(self, node: Node) -> None:
        assert node.fetch
        self._perform(node, node.fetch.start(self.now))
        for other in self.nodes:
            if other is node or not self._alive(other) or other.temper.joins_s > self.now:
                continue
            if other.temper.gives and node.number not in other.temper.hidden_from:
                self._meet(node, other)
            reached = node.temper.gives and other.number not in node.temper.hidden_from
            if other.fetch and reached:
                self._meet(other, node)
        self._tick_later(node)

    def _meet(self, fetcher: Node, source: Node) -> None:
        """After a while ``fetcher`` opens a session with ``source``."""

        def opened() -> None:
            if fetcher.fetch and not fetcher.done_s and self._alive(fetcher) and self._alive(source):
                if fetcher.number not in source.queues:
                    source.queues[fetcher.number] = deque()
                    source.turns.append(fetcher.number)
                self._tell(fetcher, source)

        self._at(self.now + self.random.random() * 0.2, opened)

    def _tell(self, fetcher: Node, source: Node) -> None:
        haves = self._as_haves(source.haves)

        def heard() -> None:
            if fetcher.fetch and self._alive(source) and not fetcher.fetch.banned(source.peer):
                self._perform(fetcher, fetcher.fetch.on_source(source.peer, haves, self.now))

        self._soon(heard)

    def _news(self, node: Node) -> None:
        """The node has a new chunk: it says so at once, or when its pause is over."""
        if node.news_due or not node.temper.gives:
            return
        node.news_due = True
        self._at(max(self.now, node.news_s + NEWS_S), partial(self._say_news, node))

    def _say_news(self, node: Node) -> None:
        node.news_due = False
        node.news_s = self.now
        if self._stalled(node):
            return
        for number in node.queues:
            if not self.nodes[number].done_s:
                self._tell(self.nodes[number], node)

    def _die(self, node: Node) -> None:
        for other in self.nodes:
            if other.fetch and not other.done_s and self._alive(other):
                self._perform(other, other.fetch.on_source_gone(node.peer, self.now))
            other.queues.pop(node.number, None)
            other.under_way.pop(node.number, None)
            other.offer.gone(node.peer)
            if node.number in other.turns:
                other.turns.remove(node.number)

    def _stalled(self, node: Node) -> bool:
        return node.temper.stalls_s is not None and self.now >= node.temper.stalls_s

    # --- a fetcher ---

    def _tick_later(self, node: Node) -> None:
        if not node.fetch or node.done_s or not self._alive(node):
            return
        due_s = node.fetch.deadline()
        if due_s is not None and due_s <= self.now:
            self._perform(node, node.fetch.tick(self.now))
        self._at(
            self.now + 0.1 if due_s is None else min(max(due_s, self.now + 0.01), self.now + 0.1),
            lambda: self._tick_later(node),
        )

    def _perform(self, node: Node, actions: list[fetch.Action]) -> None:
        self.calls += 1
        for action in actions:
            match action:
                case fetch.Request(peer=peer, index=index):
                    source = self.nodes[int(peer[1:])]
                    self._soon(partial(self._wanted, source, node, index))
                case fetch.Cancel(peer=peer, index=index):
                    source = self.nodes[int(peer[1:])]
                    self._soon(partial(self._cancel, source, node, index))
                case fetch.Ban(peer=peer) | fetch.Drop(peer=peer):
                    source = self.nodes[int(peer[1:])]
                    source.queues.pop(node.number, None)
                    source.under_way.pop(node.number, None)
                    if node.number in source.turns:
                        source.turns.remove(node.number)
                    assert node.fetch
                    self._at(self.now, partial(self._gone, node, source))
                case fetch.Done():
                    node.done_s = self.now
                case fetch.Demote() | fetch.Stuck():
                    pass

    def _gone(self, node: Node, source: Node) -> None:
        assert node.fetch
        self._perform(node, node.fetch.on_source_gone(source.peer, self.now))
        if not node.fetch.banned(source.peer):
            self._at(self.now + 1.0, partial(self._meet, node, source))

    def _arrived(self, node: Node, source: Node, index: int, bad: bool) -> None:
        core = node.fetch
        if core is None or not self._alive(node) or not self._alive(source):
            return
        if not core.needs(index):
            self._perform(node, core.on_chunk_double(source.peer, index, CHUNK_BYTES, self.now))
        elif bad:
            source.bad_to[node.number] = source.bad_to.get(node.number, 0) + 1
            self._perform(node, core.on_chunk_bad(source.peer, index, CHUNK_BYTES, self.now))
        else:
            node.haves |= 1 << index
            self._perform(node, core.on_chunk_ok(source.peer, index, CHUNK_BYTES, self.now))
            self._news(node)

    def _answered(self, node: Node, source: Node, answer: Callable[[fetch.Fetch, float], list[fetch.Action]]) -> None:
        if node.fetch and self._alive(node) and self._alive(source):
            self._perform(node, answer(node.fetch, self.now))

    def _heard_part(self, node: Node, source: Node) -> None:
        if node.fetch:
            node.fetch.on_part(source.peer, self.now)

    # --- a source ---

    def _wanted(self, source: Node, node: Node, index: int) -> None:
        queue = source.queues.get(node.number)
        if queue is None or not self._alive(source):
            return
        assert index not in queue
        queue.append(index)
        if not source.sending:
            self._serve(source)

    def _cancel(self, source: Node, node: Node, index: int) -> None:
        current = source.under_way.get(node.number)
        queue = source.queues.get(node.number, ())
        if index in queue or (current and current[0] == index):
            source.cancelled.add((node.number, index))

    def _serve(self, source: Node) -> None:
        """Put the next part on the wire."""
        source.sending = False
        if not self._alive(source) or self._stalled(source):
            return
        if not self.shared:
            self._reserve(source)
            return
        for _ in range(len(source.turns)):
            number = source.turns[0]
            if not self._ready(source, self.nodes[number]):
                source.turns.rotate(-1)
                continue
            source.sending = True
            self._at(self.now + source.temper.uplink_s / PARTS, partial(self._sent, source, number, 1))
            return

    def _reserve(self, source: Node) -> None:
        """Each session takes up its next want and waits until the uplink is free for all of it, as a throttle does."""
        for number in source.turns:
            if number not in source.under_way and self._ready(source, self.nodes[number]):
                source.free_s = max(source.free_s, self.now) + source.temper.uplink_s
                self._at(source.free_s, partial(self._sent, source, number, PARTS))

    def _ready(self, source: Node, node: Node) -> bool:
        """Whether there is something to send to ``node``; takes up the next want that is to be served."""
        while node.number not in source.under_way:
            queue = source.queues[node.number]
            if not queue:
                return False
            index = queue.popleft()
            if (node.number, index) in source.cancelled:
                self._withdrawn(source, node, index, 0)
                continue
            pause_s = source.offer.ask(node.peer, index, self.now) if self.steer else 0.0
            if pause_s:
                source.refusals += 1
                self._soon(partial(self._answered, node, source, partial(_busy, source.peer, index, pause_s)))
                continue
            source.under_way[node.number] = (index, 0, self.now)
        return True

    def _withdrawn(self, source: Node, node: Node, index: int, parts: int) -> None:
        source.cancelled.discard((node.number, index))
        source.offer.lost(node.peer, index)
        wasted = parts * CHUNK_BYTES // PARTS
        self._soon(partial(self._answered, node, source, partial(_cancelled, source.peer, index, wasted)))

    def _sent(self, source: Node, number: int, step: int) -> None:
        source.sent += step / PARTS
        current = source.under_way.get(number)
        if current is not None and self._alive(source):
            index, parts, since_s = current
            parts += step
            node = self.nodes[number]
            if parts >= PARTS:
                del source.under_way[number]
                source.cancelled.discard((number, index))
                source.offer.sent(self.now - since_s, self.now)
                bad = self.random.random() < source.temper.lies
                self._soon(partial(self._arrived, node, source, index, bad))
            elif (number, index) in source.cancelled:
                del source.under_way[number]
                self._withdrawn(source, node, index, parts)
            else:
                source.under_way[number] = (index, parts, since_s)
                self._soon(partial(self._heard_part, node, source))
        source.turns.rotate(-1)
        self._serve(source)


def _busy(peer: PeerId, index: int, pause_s: float, core: fetch.Fetch, now: float) -> list[fetch.Action]:
    return core.on_busy(peer, index, pause_s, now)


def _cancelled(peer: PeerId, index: int, wasted: int, core: fetch.Fetch, now: float) -> list[fetch.Action]:
    return core.on_cancelled(peer, index, wasted, now)


def seed_and_fetchers(count: int, fetchers: int, seed_s: float, peer_s: float) -> list[Temper]:
    """One seed that needs ``seed_s`` a chunk, and fetchers that need ``peer_s``."""
    return [Temper(seed_s, has=(1 << count) - 1), *(Temper(peer_s) for _ in range(fetchers))]
