"""Many requests among peers that come and go, in virtual time: real deliveries and circuit breakers, no tasks, no network.

Checks at each ask that the peer may be asked, and that of those who find out whether it works again there is one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from meshmax.base.errors import Busy, EngineUnavailable, MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, Event, Finish, GenerateRequest, RoutedEvent
from meshmax.base.status import PeerState
from meshmax.core.breaker import MAX_BACKOFF_S, OWN_BACKOFF_S, PROBE_S, Breakers
from meshmax.core.contender import Contender
from meshmax.core.delivery import Delivery
from meshmax.core.delivery_words import Action, Cancel, Choice, Done, Fail, Give, Start
from meshmax.core.eligibility import kept_out, rest_of
from meshmax.core.pace import Gaps, frame_gaps, keep_alive_s
from tests.core.contenders import MODEL, peer

RTT_S, FIRST_S, GAP_S = 0.002, 0.05, 0.02
State = Literal["sound", "down", "offline", "broken", "busy", "full", "loading"]
"""down: asks fail; offline: it is known to be away; broken: its engine fails; full: it is busy and says so in its status."""


class Phase(msgspec.Struct):
    """``state`` for so long."""

    state: State
    for_s: float


class Holder:
    """A peer that has the model: ``phases``, one after the other, the last for ever."""

    def __init__(self, name: str, phases: Sequence[Phase], *, ours: bool = False) -> None:
        self.id, self.ours = PeerId(name), ours
        self.gaps, self.frames = Gaps(), frame_gaps()
        ends = itertools.accumulate(phase.for_s for phase in phases)
        self.states = [(end_s, self._possible(phase.state)) for end_s, phase in zip(ends, phases, strict=True)]

    def _possible(self, state: State) -> State:
        return "broken" if self.ours and state in ("down", "offline") else state  # we are there

    def state(self, now: float) -> State:
        return next(state for end_s, state in self.states if now < end_s)


class Client:
    """One request."""

    def __init__(self, mesh: Mesh, words: str, deadline_s: float) -> None:
        self.mesh, self.words = mesh, words
        self.began_s = mesh.now
        self.given: list[RoutedEvent] = []
        self.error: MeshmaxError | None = None
        self.done = False
        self.ended_s: float | None = None
        self.cancelled: set[int] = set()
        self.waited_at: list[float] = []
        self.core = Delivery(GenerateRequest(words), self, mesh.random, mesh.now, deadline_s=deadline_s, model="m")

    def choices(self) -> Sequence[Choice]:
        """As services.router makes them."""
        now, free, resting = self.mesh.now, [], []
        for holder in self.mesh.holders.values():
            contender = self.mesh.contender(holder)
            kept = kept_out(contender)
            rests, from_s = rest_of(contender, kept[0], now) if kept else ("", 0.0)
            choice = Choice(
                holder.id, holder.gaps, holder.frames, FIRST_S, 1.0, RTT_S, holder.ours, from_s, rests, name=holder.id
            )
            if kept is None:
                free.append(choice)
            elif rests:
                resting.append(choice)
        return free + sorted(resting, key=lambda choice: choice.from_s)

    def may_hedge(self, lateness: int) -> bool:
        return True

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.given if isinstance(event, Delta))

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert not (self.done or self.error), "nothing comes after the end"
            if isinstance(action, Start):
                self.mesh.ask(self, action)
            elif isinstance(action, Cancel):
                self.cancelled.add(action.attempt)
                self.mesh.on_cancelled(self, action)
            elif isinstance(action, Give):
                self.given.extend(action.events)
            elif isinstance(action, Done):
                self.done = True
            elif isinstance(action, Fail):
                self.error = action.error
        if (self.done or self.error) and self.ended_s is None:
            self.ended_s = self.mesh.now
            self.mesh.leave(self)
        if self.core.waits:
            self.waited_at.append(self.mesh.now)
        self.mesh.clock(self)


class _Ask(msgspec.Struct):
    holder: Holder
    sent_s: float
    probe: bool
    finds_out: bool  # a probe, and nobody else has found out meanwhile
    told_s: float


class Mesh:
    """Peers, the requests of one node, and the time."""

    def __init__(self, holders: Iterable[Holder], seed: int = 1) -> None:
        self.holders = {holder.id: holder for holder in holders}
        self.random = random.Random(seed)
        self.breakers = Breakers(self.random)
        self.now = 0.0
        self.clients: list[Client] = []
        self.asks: dict[tuple[int, int], _Ask] = {}
        self.asked: list[tuple[float, PeerId]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        for holder in self.holders.values():
            for end_s, state in holder.states[:-1]:
                self.at(end_s, lambda holder=holder, was=state: self._on_phase(holder, was))  # type: ignore[misc]

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when_s, self.now), next(self._count), what))

    def come(self, when_s: float, words: str, deadline_s: float) -> None:
        """A request comes."""

        def begin() -> None:
            client = Client(self, words, deadline_s)
            self.clients.append(client)
            if client.choices():
                client.do(client.core.begin(self.now))
            else:
                self.clients.remove(client)  # as the router refuses it

        self.at(when_s, begin)

    def run(self) -> None:
        while self._heap:
            self.now, _, what = heapq.heappop(self._heap)
            what()

    def clock(self, client: Client) -> None:
        due = client.core.deadline()

        def tick() -> None:
            if client.core.deadline() <= self.now:
                client.do(client.core.tick(self.now))
            else:
                self.clock(client)  # another request taught it to be more patient

        if due < float("inf"):
            self.at(due, tick)

    def news(self) -> None:
        """What services.waiting does."""
        waiting = [client for client in self.clients if client.core.waits]
        self.random.shuffle(waiting)
        for client in waiting:
            self.at(self.now, lambda client=client: client.do(client.core.on_news(self.now)))  # type: ignore[misc]

    def _on_phase(self, holder: Holder, was: str) -> None:
        state = holder.state(self.now)
        if was in ("down", "offline") and state not in ("down", "offline"):
            self.breakers.on_returned(holder.id, self.now)
        self.breakers.on_load(holder.id, MODEL, state != "full", self.now)
        self.news()

    def contender(self, holder: Holder) -> Contender:
        standing = self.breakers.standing(holder.id, MODEL, self.now)
        state = holder.state(self.now)
        there: PeerState = "offline" if state == "offline" else "self" if holder.ours else "online"
        load = {"running": 4, "queued": 8, "limit": 8} if state == "full" else {}
        return peer(holder.id, standing=standing, peer_state=there, **load)

    # --- asks --------------------------------------------------------------------------------------------------------

    def ask(self, client: Client, start: Start) -> None:
        holder = self.holders[start.choice.peer]
        kept = kept_out(self.contender(holder))
        assert kept is None or (holder.ours and kept[0] == "full"), "it may not be asked now"
        probe = self.breakers.on_probe_sent(holder.id, MODEL, self.now)
        out = [a for a in self.asks.values() if a.holder is holder and a.finds_out and self.now < a.sent_s + PROBE_S]
        assert not (probe and out), "two find out"
        self.asked.append((self.now, holder.id))
        ask = _Ask(holder, self.now, probe, probe, self.now)
        self.asks[id(client), start.attempt] = ask
        self.at(self.now + RTT_S, lambda: self._arrives(client, start, ask))

    def _arrives(self, client: Client, start: Start, ask: _Ask) -> None:
        if (id(client), start.attempt) not in self.asks:
            return
        state = ask.holder.state(self.now)
        if state in ("down", "offline"):
            self._fail(client, start, ask, PeerGone("it is not there"))
        elif state in ("busy", "full"):
            self._fail(client, start, ask, Busy("full", 3.0))
        else:
            self.breakers.on_reached(ask.holder.id)
            self._found_out(ask.holder)
            client.do(client.core.on_accepted(start.attempt, self.now))
            self.news()
            if state == "broken":
                self.at(self.now + RTT_S, lambda: self._fail(client, start, ask, EngineUnavailable()))
            else:
                said = (
                    start.request.said.text if isinstance(start.request, GenerateRequest) and start.request.said else ""
                )
                rest = client.words.removeprefix(said)
                words = [word if n == 0 else f" {word}" for n, word in enumerate(rest.split(" "))] if rest else []
                events: list[Event] = [Delta(word) for word in (words[1:] if rest.startswith(" ") else words)]
                first_s = 60.0 if state == "loading" else FIRST_S
                self.at(self.now + first_s, lambda: self._speak(client, start, ask, [*events, Finish()]))
                self._keep_alive(client, start, ask)

    def _found_out(self, holder: Holder) -> None:
        if self.breakers.standing(holder.id, MODEL, self.now).code in ("", "busy"):
            for ask in self.asks.values():
                ask.finds_out &= ask.holder is not holder

    def _keep_alive(self, client: Client, start: Start, ask: _Ask) -> None:
        def tell() -> None:
            if (id(client), start.attempt) in self.asks and ask.holder.state(self.now) not in ("down", "offline"):
                client.do(client.core.on_heard(start.attempt, self.now))
                self._keep_alive(client, start, ask)

        self.at(self.now + keep_alive_s(self.now - ask.told_s), tell)

    def _speak(self, client: Client, start: Start, ask: _Ask, events: list[Event]) -> None:
        if (id(client), start.attempt) not in self.asks:
            return
        if ask.holder.state(self.now) in ("down", "offline"):
            self._fail(client, start, ask, PeerGone("it died"))
            return
        ask.told_s = self.now
        self.breakers.on_success(ask.holder.id, MODEL)
        self._found_out(ask.holder)
        if isinstance(events[0], Finish):
            self.breakers.on_answered(ask.holder.id, MODEL, self.now)
            self.asks.pop((id(client), start.attempt))
        client.do(client.core.on_events(start.attempt, events[:1], self.now))
        if len(events) > 1:
            self.at(self.now + GAP_S, lambda: self._speak(client, start, ask, events[1:]))
        self.news()

    def _fail(self, client: Client, start: Start, ask: _Ask, error: MeshmaxError) -> None:
        if self.asks.pop((id(client), start.attempt), None) is None:
            return
        self._told(ask, error)
        self.news()
        client.do(client.core.on_failed(start.attempt, error, self.now))

    def _told(self, ask: _Ask, error: MeshmaxError) -> None:
        """As services.trial tells it."""
        holder, sent_s = ask.holder.id, ask.sent_s
        if isinstance(error, Busy):
            if not ask.holder.ours:
                self.breakers.on_busy(holder, MODEL, error.retry_after_s, self.now)
                self.breakers.on_load(holder, MODEL, ask.holder.state(self.now) != "full", self.now)
        else:
            digest = None if isinstance(error, PeerGone) else MODEL
            most_s = OWN_BACKOFF_S if ask.holder.ours else MAX_BACKOFF_S
            self.breakers.on_failure(holder, digest, error.code, self.now, sent_s=sent_s, most_s=most_s)
        if ask.probe:
            self.breakers.on_probe_ended(holder, MODEL, sent_s)

    def on_cancelled(self, client: Client, cancel: Cancel) -> None:
        if ask := self.asks.pop((id(client), cancel.attempt), None):
            if cancel.why is not None:
                self._told(ask, cancel.why)
            elif ask.probe:
                self.breakers.on_probe_ended(ask.holder.id, MODEL, ask.sent_s)
            self.news()

    def leave(self, client: Client) -> None:
        """The request is over; what it still had under way is ended."""
        for key in [key for key in self.asks if key[0] == id(client)]:
            ask = self.asks.pop(key)
            if ask.probe:
                self.breakers.on_probe_ended(ask.holder.id, MODEL, ask.sent_s)
        self.news()
