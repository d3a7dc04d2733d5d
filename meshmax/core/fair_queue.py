"""Who waits for a model on this peer, who is next, and who is told to come again. Sans-IO.

Places. At most ``max_waiting`` asks wait in all, at most ``max_per_member`` of one peer. Nobody, ourselves included, may hold
more places than are free: one alone has nearly half of them, of nine each a tenth (dynamic thresholds: Choudhury and Hahne,
IEEE/ACM ToN 6, 1998); and the last eighth is for those who have none, so that however greedy some are, one who comes later
finds a place. That is counted for interactive and for batch asks each by itself, and batch asks leave a quarter of each bound
free. An ask that can start at once needs no place.

Order, per model. Interactive asks go first; a batch ask that has waited BATCH_PATIENCE_S goes before them, but at most every
BATCH_EVERY-th time: neither can starve the other. Among asks of one priority the requester goes next that has
had the least time of slots so far; one that comes back does not bring along what it left unused (start-time fair queueing; for
language models: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). What an ask takes is
not known before: it is charged the mean, and what it really took once it has ended. Of one requester, first come, first served.

Busy tells when to come again: when half of what waits before that requester has been served, by the measured times, so that
places are free then and slots are still in use. An interactive ask that would wait longer than ``max_wait_s`` is refused at once:
nobody listens for so long, and another peer may be free. Each step takes O(log n). Not here: memory, loading (core.residency).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import msgspec

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Priority
from meshmax.core.context import Context
from meshmax.core.ewma import Ewma

QUEUE_FULL: Final = "server busy, please try again.  maximum pending requests exceeded"  # Ollama's words, two blanks

NEWCOMERS_SHARE: Final = 8  # an eighth of the places
INTERACTIVE_SHARE: Final = 4  # a quarter of each bound is not for batch asks
BATCH_PATIENCE_S: Final = 10.0  # of a batch ask; about as long as a person waits for the first word
BATCH_EVERY: Final = 8  # starts: what batch asks have at least, while interactive ones wait
MIN_RETRY_S: Final = 1.0  # HTTP's Retry-After counts in seconds
MAX_RETRY_S: Final = 60.0  # estimates of what is farther away are worth little
GUESSED_SERVICE_S: Final = 1.0  # of an ask, until one was measured: all cost the same then
MAX_LINES: Final = 256  # models whose times are remembered; the one used longest ago is forgotten first
MAX_ACCOUNTS: Final = 1024  # requesters of one model; more than peers are connected at once

Requester = PeerId | None  # None: ourselves


class Ask(msgspec.Struct):
    """A request that waits for a model or uses it. ``slots`` 0: it waits for the load only.

    ``charged_s``: of slot time, when it started at ``started_s``. ``best``: the context that it wants, ``least``: with which it
    is content where that cannot be had.
    """

    id: int
    digest: Sha256
    keep_alive_s: float
    requester: Requester = None
    priority: Priority = "interactive"
    slots: int = 1
    since_s: float = 0.0
    started_s: float = 0.0
    charged_s: float = 0.0
    best: Context = Context()
    least: Context = Context()


class _Account:
    """A requester of one model: what it has had, and its asks that wait."""

    __slots__ = ("asks", "running", "served_s")

    def __init__(self) -> None:
        self.served_s = 0.0
        self.running = 0
        self.asks: OrderedDict[int, Ask] = OrderedDict()


class _Lane:
    """The asks of one priority for one model, fair between requesters."""

    def __init__(self) -> None:
        self.asks: OrderedDict[int, Ask] = OrderedDict()  # in order of arrival
        self.requesters = 0  # of them
        self._accounts: dict[Requester, _Account] = {}
        self._heap: list[tuple[float, int, Requester]] = []  # also of accounts as they were before: skipped
        self._entries = 0
        self._served_s = 0.0  # what the one who was next last had had: nobody who comes now starts with less

    def add(self, ask: Ask) -> None:
        account = self._accounts.setdefault(ask.requester, _Account())
        self.asks[ask.id] = account.asks[ask.id] = ask
        if len(account.asks) == 1:
            self.requesters += 1
            account.served_s = max(account.served_s, self._served_s)
            self._push(ask.requester, account)

    def remove(self, ask: Ask) -> None:
        """Of one that waits."""
        account = self._accounts[ask.requester]
        del self.asks[ask.id], account.asks[ask.id]
        self.requesters -= not account.asks
        self._tidy(ask.requester, account)

    def take(self, cost_s: float, most_tokens: float = math.inf) -> Ask | None:
        """The next one that wants a context of no more than ``most_tokens``; those that are passed over keep their turn."""
        passed: list[tuple[float, int, Requester]] = []
        found: Ask | None = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            served_s, _, requester = entry
            account = self._accounts.get(requester)
            if not (account and account.asks and account.served_s == served_s):
                continue
            found = next((ask for ask in account.asks.values() if ask.best.tokens <= most_tokens), None)
            if found is None:
                passed.append(entry)
                continue
            del account.asks[found.id], self.asks[found.id]
            self._served_s = max(self._served_s, served_s)
            account.served_s += cost_s
            account.running += 1
            if account.asks:
                self._push(requester, account)
            else:
                self.requesters -= 1
            found.charged_s = cost_s
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def settle(self, ask: Ask, took_s: float) -> None:
        """One that was taken has ended."""
        account = self._accounts[ask.requester]
        account.running -= 1
        account.served_s += took_s - ask.charged_s
        if account.asks:
            self._push(ask.requester, account)
        self._tidy(ask.requester, account)

    def waiting(self, requester: Requester) -> int:
        account = self._accounts.get(requester)
        return len(account.asks) if account else 0

    def _push(self, requester: Requester, account: _Account) -> None:
        self._entries += 1
        heapq.heappush(self._heap, (account.served_s, self._entries, requester))
        if len(self._heap) > 4 * self.requesters + 64:  # mostly entries that are to be skipped
            self._rebuild()

    def _rebuild(self) -> None:
        newest: dict[Requester, tuple[float, int, Requester]] = {}
        for entry in sorted(self._heap, key=lambda entry: entry[1]):
            account = self._accounts.get(entry[2])
            if account and account.asks and account.served_s == entry[0]:
                newest.setdefault(entry[2], entry)
        self._heap = list(newest.values())
        heapq.heapify(self._heap)

    def _tidy(self, requester: Requester, account: _Account) -> None:
        """Forget who has nothing here any more and is owed nothing."""
        if not account.asks and not account.running and account.served_s <= self._served_s:
            del self._accounts[requester]
        elif len(self._accounts) > MAX_ACCOUNTS:
            self._accounts = {r: a for r, a in self._accounts.items() if a.asks or a.running}


class _Line:
    """What waits for one model."""

    def __init__(self) -> None:
        self.lanes: dict[Priority, _Lane] = {"interactive": _Lane(), "batch": _Lane()}
        self.visitors: OrderedDict[int, Ask] = OrderedDict()  # that need no slot
        self.wanted: dict[int, tuple[int, Context]] = {}  # contexts of those that wait, by their tokens: of how many
        self.service = Ewma()  # seconds that a slot is used for one ask
        self.parallel = 1
        self.running = 0
        self.passed_over = 0  # interactive asks started since a batch ask could have been

    def __len__(self) -> int:
        return len(self.visitors) + len(self.lanes["interactive"].asks) + len(self.lanes["batch"].asks)

    def want(self, context: Context, more: int) -> None:
        """So many more wait for this context, or fewer."""
        count = self.wanted.get(context.tokens, (0, context))[0] + more
        if count:
            self.wanted[context.tokens] = count, context
        else:
            del self.wanted[context.tokens]

    def take(self, free_slots: int, now: float, most_tokens: float) -> Ask | None:
        """The next ask that wants a context of no more than ``most_tokens``."""
        visitor = next((ask for ask in self.visitors.values() if ask.best.tokens <= most_tokens), None)
        if visitor is not None:
            return self.visitors.pop(visitor.id)
        lane = self.next_lane(now) if free_slots > 0 else None
        if lane is None:
            return None
        mean_s = self.service.value
        cost_s = GUESSED_SERVICE_S if mean_s is None else mean_s
        ask = lane.take(cost_s, most_tokens)
        if ask is None:  # where nobody in it can be served now the other one is
            other = self.lanes["batch" if lane is self.lanes["interactive"] else "interactive"]
            ask = other.take(cost_s, most_tokens)
        return ask

    def next_lane(self, now: float) -> _Lane | None:
        interactive, batch = self.lanes["interactive"], self.lanes["batch"]
        if not batch.asks:
            return interactive if interactive.asks else None
        waited_s = now - next(iter(batch.asks.values())).since_s
        due = waited_s >= BATCH_PATIENCE_S and self.passed_over >= BATCH_EVERY - 1
        if due or not interactive.asks:
            self.passed_over = 0
            return batch
        self.passed_over += 1
        return interactive

    def wait_s(self, requester: Requester, priority: Priority) -> float | None:
        """How long one more ask would wait for a slot; None where nothing was measured yet."""
        if self.service.value is None:
            return None
        lane = self.lanes[priority]
        own = lane.waiting(requester)
        rounds = own + 1  # of which each other requester has one turn, as long as it has asks
        others = lane.requesters - (own > 0)
        ahead = min(len(lane.asks), own + rounds * others)
        if priority == "batch":
            ahead += len(self.lanes["interactive"].asks)
        return (ahead + 1) * self.service.value / self.parallel


class FairQueue:
    """The waiting places of one peer. Owned by one task; every ``now`` is of one monotonic clock, in seconds."""

    def __init__(self, max_waiting: int, max_per_member: int, max_wait_s: float) -> None:
        self._max_waiting = max_waiting
        self._max_per_member = max_per_member
        self._max_wait_s = max_wait_s
        self._lines: OrderedDict[Sha256, _Line] = OrderedDict()
        self._wanted: OrderedDict[Sha256, None] = OrderedDict()  # models that somebody waits for, longest first
        self._waiting: dict[int, Ask] = {}
        self._running: dict[int, Ask] = {}
        self._held: dict[tuple[Requester, Priority], int] = {}  # places
        self._of: dict[Priority, int] = {"interactive": 0, "batch": 0}

    def __len__(self) -> int:
        """Asks that wait."""
        return len(self._waiting)

    def waiting(self, digest: Sha256) -> int:
        """Asks that wait for this model."""
        line = self._lines.get(digest)
        return len(line) if line else 0

    def ahead(self, digest: Sha256) -> int:
        """Asks that an interactive one that comes now has before it, where its requester has had as much as the others."""
        line = self._lines.get(digest)
        return len(line.lanes["interactive"].asks) if line else 0

    def waiting_of(self, priority: Priority) -> int:
        """Asks of this priority that wait."""
        return self._of[priority]

    def wanted(self) -> Iterator[tuple[Sha256, float]]:
        """The models that somebody waits for, longest first, with the keep-alive of one of those."""
        for digest in self._wanted:
            line = self._lines[digest]
            lanes = (line.visitors, *(lane.asks for lane in line.lanes.values()))
            first = min((next(iter(asks.values())) for asks in lanes if asks), key=lambda ask: ask.id)
            yield digest, first.keep_alive_s

    def yield_turn(self, digest: Sha256) -> None:
        """This model has been in memory and gives way: whoever waits for another one comes before those who wait for it."""
        if digest in self._wanted:
            self._wanted.move_to_end(digest)

    def join(self, ask: Ask, now: float, *, at_once: bool = False) -> None:
        """Wait. ``at_once``: it can start now, so that it needs no place. Raises Busy, nothing is kept then."""
        line = self._line(ask.digest)
        if not at_once:
            self._check_room(ask, line)
        ask.since_s = now
        if ask.slots:
            line.lanes[ask.priority].add(ask)
        else:
            line.visitors[ask.id] = ask
        line.want(ask.best, 1)
        self._waiting[ask.id] = ask
        key = ask.requester, ask.priority
        self._held[key] = self._held.get(key, 0) + 1
        self._of[ask.priority] += 1
        self._wanted.setdefault(ask.digest)

    def leave(self, ask_id: int, now: float) -> None:
        """An ask has ended, or whoever asked went away while it waited. Idempotent."""
        if ask := self._waiting.get(ask_id):
            line = self._lines[ask.digest]
            if ask.slots:
                line.lanes[ask.priority].remove(ask)
            else:
                del line.visitors[ask_id]
            self._give_place_back(ask)
        elif ask := self._running.pop(ask_id, None):
            line = self._lines[ask.digest]
            line.running -= 1
            if ask.slots:
                line.service.add(now - ask.started_s, now)
                line.lanes[ask.priority].settle(ask, now - ask.started_s)

    def largest(self, digest: Sha256) -> Context:
        """The largest context that somebody waits for, of this model."""
        line = self._lines.get(digest)
        return line.wanted[max(line.wanted)][1] if line and line.wanted else Context()

    def start_next(self, digest: Sha256, free_slots: int, now: float, most_tokens: float = math.inf) -> Ask | None:
        """The ask that may use the model now, which is loaded with ``most_tokens`` of context and has ``free_slots``; None if
        there is none. One that wants more waits on, and is next as soon as it can be."""
        line = self._lines.get(digest)
        if line is None or not len(line):
            return None
        ask = line.take(free_slots, now, most_tokens)
        if ask is None:
            return None
        ask.started_s = now
        line.running += 1
        self._running[ask.id] = ask
        self._give_place_back(ask)
        return ask

    def drop(self, digest: Sha256, tokens: int = 0) -> list[int]:
        """The model could not be loaded with ``tokens`` of context. Who is content with less waits for that, the others, who are
        returned, wait no more; 0: nobody does."""
        line = self._lines.get(digest)
        if line is None:
            return []
        waiting = [*line.visitors, *line.lanes["interactive"].asks, *line.lanes["batch"].asks]
        dropped = []
        for ask_id in sorted(waiting):
            ask = self._waiting[ask_id]
            if ask.least.tokens >= tokens:
                dropped.append(ask_id)
                self.leave(ask_id, 0.0)  # it waits, so that the time does not matter
            else:  # also who wants less than that: were it to fail as well, nobody would wait any more
                line.want(ask.best, -1)
                ask.best = ask.least
                line.want(ask.best, 1)
        return dropped

    def on_loaded(self, digest: Sha256, parallel: int) -> None:
        """The model answers ``parallel`` asks at once."""
        self._line(digest).parallel = max(parallel, 1)

    def retry_after_s(self, digest: Sha256, requester: Requester, priority: Priority) -> float:
        """When one who is turned away now does well to come again."""
        line = self._lines.get(digest)
        wait_s = line.wait_s(requester, priority) if line else None
        return MIN_RETRY_S if wait_s is None else min(max(wait_s / 2, MIN_RETRY_S), MAX_RETRY_S)

    def _check_room(self, ask: Ask, line: _Line) -> None:
        if why := self._why_not(ask, line):
            raise Busy(f"{QUEUE_FULL} ({why})", self.retry_after_s(ask.digest, ask.requester, ask.priority))

    def _why_not(self, ask: Ask, line: _Line) -> str:
        most, per_member = self._max_waiting, self._max_per_member
        free = most - len(self._waiting)
        held = self._held.get((ask.requester, ask.priority), 0)
        of_member = sum(self._held.get((ask.requester, kind), 0) for kind in self._of)
        if ask.priority == "batch":
            free = min(free, most - most // INTERACTIVE_SHARE - self._of["batch"])
            per_member -= per_member // INTERACTIVE_SHARE
        if free <= 0:
            return f"{len(self._waiting)} wait here"
        if held and held >= free - most // NEWCOMERS_SHARE:
            return f"{held} of one member wait here, and {free} places are left for others"
        if ask.requester is not None and of_member >= per_member:
            return f"{of_member} of one member wait here"
        wait_s = line.wait_s(ask.requester, ask.priority)
        if ask.priority == "interactive" and wait_s is not None and wait_s > self._max_wait_s:
            return f"it would wait {wait_s:.0f} s"
        return ""

    def _give_place_back(self, ask: Ask) -> None:
        del self._waiting[ask.id]
        self._lines[ask.digest].want(ask.best, -1)
        key = ask.requester, ask.priority
        self._held[key] -= 1
        self._of[ask.priority] -= 1
        if not self._held[key]:
            del self._held[key]
        if not len(self._lines[ask.digest]):
            del self._wanted[ask.digest]

    def _line(self, digest: Sha256) -> _Line:
        line = self._lines.get(digest)
        if line is None:
            line = self._lines[digest] = _Line()
        self._lines.move_to_end(digest)
        if len(self._lines) > MAX_LINES:
            idle = next(
                (d for d, each in self._lines.items() if not len(each) and not each.running and d != digest), None
            )
            if idle is not None:
                del self._lines[idle]
        return line
