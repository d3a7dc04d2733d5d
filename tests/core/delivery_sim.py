"""Peers that echo words in virtual time and go wrong in every way, for core.delivery alone: no tasks, no network."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from meshmax.base.errors import Busy, CapabilityMissing, EngineCrashed, MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.inference import (
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Moved,
    RoutedEvent,
    Vector,
)
from meshmax.core.delivery import MAX_OPEN, Delivery
from meshmax.core.delivery_words import Action, Cancel, Choice, Done, Fail, Give, Start, Suspect
from meshmax.core.pace import Gaps, frame_gaps, keep_alive_s

RTT_S = 0.002
Fault = Literal["none", "dies", "crashes", "freezes", "hangs", "busy", "ends"]


class Peer(msgspec.Struct):
    """``fault`` comes after ``after`` tokens of an answer; ``for_s``: how long a freeze or a hang lasts."""

    name: str
    first_s: float = 0.05
    gap_s: float = 0.02
    fault: Fault = "none"
    after: int = 0
    for_s: float = float("inf")
    goes_on: bool = True  # its engine honours `said`
    together: int = 1  # tokens of one event batch
    late_s: float = 1.0
    lasting: bool = True  # the fault comes with each answer
    dead: bool = False
    stopped_until: float = 0.0
    busy_until: float = 0.0
    rests_until: float = 0.0  # its breaker is open


class Run:
    """One request among ``peers``, best first."""

    def __init__(
        self, peers: Sequence[Peer], request: InferRequest, *, hedges: int = 100, seed: int = 1, **limits: Any
    ) -> None:
        self.peers = {PeerId(peer.name): peer for peer in peers}
        self.request = request
        self.now = 0.0
        self.hedges = hedges
        self.given: list[RoutedEvent] = []
        self.gave_at: list[float] = []
        self.error: MeshmaxError | None = None
        self.done = False
        self.started: list[Start] = []
        self.suspected: list[Suspect] = []
        self.cancelled: dict[int, float] = {}
        self.produced: dict[int, int] = {}
        self.absent: set[str] = set()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._gaps = {peer: Gaps() for peer in self.peers}
        self._frames = {peer: frame_gaps() for peer in self.peers}
        self.core = Delivery(request, self, random.Random(seed), 0.0, **limits)

    # --- Chooser ---

    def choices(self) -> Sequence[Choice]:
        there = (peer for peer in self.peers.values() if peer.name not in self.absent)
        return [
            Choice(
                PeerId(peer.name),
                self._gaps[PeerId(peer.name)],
                self._frames[PeerId(peer.name)],
                peer.first_s,
                peer.late_s,
                RTT_S,
                from_s=max(peer.busy_until, peer.rests_until),
                rests="busy" if self.now < peer.busy_until else "broken" if self.now < peer.rests_until else "",
                name=peer.name,
            )
            for peer in there
        ]

    def may_hedge(self, lateness: int) -> bool:
        self.hedges -= 1
        return self.hedges >= 0

    # --- driving ---

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when_s, self.now), next(self._count), what))

    def run(self, until_s: float = 10_000.0) -> Run:
        self.do(self.core.begin(0.0))
        idle = 0
        while not (self.done or self.error):
            due = self.core.deadline()
            next_s = self._heap[0][0] if self._heap else float("inf")
            if min(due, next_s) > until_s:
                break
            if due < next_s:
                self.now = max(self.now, due)
                self.do(self.core.tick(self.now))
                idle = idle + 1 if self.core.deadline() <= self.now else 0
                assert idle < 10, "time does not go on"
            else:
                self.now, _, what = heapq.heappop(self._heap)
                what()
        return self

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert not (self.done or self.error), "nothing comes after the end"
            if isinstance(action, Start):
                self.started.append(action)
                _Answer(self, action).begin()
                assert len(self.open) <= MAX_OPEN
            elif isinstance(action, Cancel):
                self.cancelled[action.attempt] = self.now
            elif isinstance(action, Suspect):
                self.suspected.append(action)
            elif isinstance(action, Give):
                self.given.extend(action.events)
                self.gave_at += [self.now] * len(action.events)
            elif isinstance(action, Done):
                self.done = True
            elif isinstance(action, Fail):
                self.error = action.error

    @property
    def open(self) -> set[int]:
        return {start.attempt for start in self.started} - set(self.cancelled) - self.ended

    @property
    def ended(self) -> set[int]:
        return {n for n, attempt in enumerate(self.core.attempts()) if attempt.ended_s is not None}

    # --- what came of it ---

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.given if isinstance(event, Delta))

    @property
    def moved(self) -> list[str]:
        return [event.peer_id for event in self.given if isinstance(event, Moved)]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(start.choice.peer, start.kind) for start in self.started]

    @property
    def longest_gap_s(self) -> float:
        return max(after - before for before, after in itertools.pairwise([0.0, *self.gave_at]))


class _Answer:
    """One peer's answer."""

    def __init__(self, run: Run, start: Start) -> None:
        self._run, self._number, self._request = run, start.attempt, start.request
        self._peer = run.peers[start.choice.peer]
        self._events = list(_events(start.request))
        self._told_s = run.now
        self._made = 0

    def begin(self) -> None:
        peer, run = self._peer, self._run
        if peer.dead:
            run.at(run.now + RTT_S, lambda: self._fail(PeerGone("it is not there")))
        elif run.now < peer.stopped_until:
            run.at(peer.stopped_until, self.begin)
        elif peer.fault == "busy":
            peer.busy_until = run.now + RTT_S + peer.for_s
            run.at(run.now + RTT_S, lambda: self._fail(Busy("full", peer.for_s)))
        elif isinstance(self._request, GenerateRequest) and self._request.said and not peer.goes_on:
            run.at(run.now + RTT_S, lambda: self._fail(CapabilityMissing("it cannot go on")))
        else:
            run.at(run.now + RTT_S, self._accept)
            run.at(run.now + peer.first_s, self._speak)

    def _accept(self) -> None:
        if self._live():
            self._run.do(self._run.core.on_accepted(self._number, self._run.now))
            self._keep_alive()

    def _keep_alive(self) -> None:
        def tell() -> None:
            if self._run.now < self._peer.stopped_until and self._peer.fault == "freezes":
                self._run.at(self._peer.stopped_until, tell)
            elif self._live() and not self._done():
                self._run.do(self._run.core.on_heard(self._number, self._run.now))
                self._keep_alive()

        self._run.at(self._run.now + keep_alive_s(self._run.now - self._told_s), tell)

    def _speak(self) -> None:
        run, peer = self._run, self._peer
        if not self._live() or self._done():
            return
        if run.now < peer.stopped_until:
            run.at(peer.stopped_until, self._speak)
            return
        if peer.fault != "none" and self._made >= peer.after:
            fault = peer.fault
            if not peer.lasting and fault != "freezes":
                peer.fault = "none"
            self._goes_wrong(fault)
            return
        events = self._events[: peer.together]
        del self._events[: peer.together]
        self._made += len(events)
        run.produced[self._number] = self._made
        self._told_s = run.now
        run.do(run.core.on_events(self._number, events, run.now))
        if self._events:
            run.at(run.now + peer.gap_s, self._speak)

    def _goes_wrong(self, fault: Fault) -> None:
        run, peer = self._run, self._peer
        if fault == "dies":
            peer.dead = True
            self._fail(PeerGone("it died"))
        elif fault == "crashes":
            self._fail(EngineCrashed())
        elif fault == "ends":
            self._fail(PeerGone("it ended the stream"))
        elif fault == "freezes":
            peer.stopped_until = run.now + peer.for_s
            run.at(peer.stopped_until, self._wake)
        elif fault == "hangs":
            peer.fault = "none"
            run.at(run.now + peer.for_s, self._speak)

    def _wake(self) -> None:
        if not self._peer.lasting:
            self._peer.fault = "none"
        self._peer.after += 1  # goes on at least a little
        self._speak()

    def _live(self) -> bool:
        return self._number not in self._run.cancelled and self._number not in self._run.ended

    def _done(self) -> bool:
        return self._run.done or self._run.error is not None or (self._made > 0 and not self._events)

    def _fail(self, error: MeshmaxError) -> None:
        if self._live() and not self._done():
            self._run.do(self._run.core.on_failed(self._number, error, self._run.now))


def _events(request: InferRequest) -> Iterable[Event]:
    """As the echo engine answers."""
    if isinstance(request, EmbedRequest):
        for index, text in enumerate(request.inputs):
            yield Vector(index, text.encode() * 4)
        yield Finish(prompt_tokens=sum(map(len, request.inputs)))
        return
    assert isinstance(request, GenerateRequest)
    rest = request.prompt.removeprefix(request.said.text if request.said else "")
    words = [word if n == 0 else f" {word}" for n, word in enumerate(rest.split(" "))] if rest else []
    if request.said and rest.startswith(" "):
        words = words[1:]
    for word in words:
        yield Delta(word)
    yield Finish(output_tokens=len(words))
