"""Peers that route prompts, simulated in virtual time with the real cores: decision, measurements, breakers, what is under way,
prefixes. Compared with an oracle, which knows what each peer would take.

What an entry peer knows of others: the load of its neighbours 0.25 s late, and half a round trip; of others what their last
status said, which spreads when their loaded models change; what a neighbour
tells of its waits (sim_waits); that a peer is gone when its connection breaks, or after six
seconds where it is silent. What it asks of a peer makes that a neighbour. A lost answer is carried on elsewhere: the next
peer reads the prompt and what was said, and says the rest.

The oracle sees, at the moment of each request, the true state of each peer that has the model, the true length of the answer,
true rates and who will die, and takes the peer that will be done first. It is greedy: it does not know the requests to
come. ``best_s`` of an outcome is the oracle's time in the very state in which the policy chose; the policy "oracle" is a run
in which the oracle chose always, with the state that followed from that. Not here: figures and tables (scripts/bench_routing).
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from functools import partial
from typing import Any, Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Policy
from meshmax.base.status import Gpu, Load, ModelPresence, PeerState, PeerStatus, PeerView, Wait
from meshmax.core.contender import Contender
from meshmax.core.estimate import Work
from meshmax.core.measurements import Measurements
from meshmax.core.outstanding import Outstanding
from meshmax.core.prefixes import Mark, Prefixes
from meshmax.core.routing import Decision, decide
from meshmax.core.told_wait import ToldWaits
from meshmax.testing.sim_mesh import TOLD_AFTER_S, Conversation, SimMesh, Size, build_mesh
from meshmax.testing.sim_peers import Plan, SimModel, SimPeer
from meshmax.testing.sim_waits import TOLD_EVERY_S

NEIGHBOURS: Final = 64
SILENT_S: Final = 6.0  # a peer that says nothing for so long is gone
NOTICED_S: Final = 2.5  # silence in an answer is noticed sooner than that of heartbeats
BACK_S: Final = 3.0  # until a peer that came back is known
MAX_TRIES: Final = 8
OUTPUT_TOKENS: Final = 256  # expected, before an answer was seen

Chooser = Policy | Literal["oracle"]


class Outcome(msgspec.Struct, frozen=True):
    """A request's end. ``total_s``: until the whole answer, infinite if there was none. ``best_s``: the oracle's.
    ``bad``: asked of a peer without the model, draining or known to be gone."""

    conversation: int
    turn: int
    peer: int
    total_s: float
    best_s: float
    failures: int
    bad: int
    estimate_s: float


class _Request(msgspec.Struct):
    conversation: Conversation
    turn: int
    came_s: float
    prompt: int
    left: int
    best_s: float
    said: int = 0
    failures: int = 0
    bad: int = 0
    estimate_s: float = 0.0
    tried: tuple[int, ...] = ()


class _Told(msgspec.Struct, frozen=True):
    """What an entry was told of a peer."""

    load: Load
    sequence: int
    view: PeerView
    model: ModelPresence


class Entry:
    """A peer that people ask, with the cores of a router."""

    def __init__(self, sim: Simulation, number: int) -> None:
        self._sim, self.number = sim, number
        self.rng = random.Random(f"{sim.mesh.size.seed}/entry/{number}")
        self.measurements = Measurements(self.rng)
        self.outstanding = Outstanding()
        self.prefixes = Prefixes()
        self.waits = ToldWaits()
        self.previous: dict[int, PeerId] = {}
        self.turns: Counter[int] = Counter()
        rtts = sim.mesh.rtts[number]
        near = sorted(range(len(rtts)), key=lambda n: rtts[n])
        others = self.rng.sample(near, min(len(near), 16))
        self.neighbours = {*near[: NEIGHBOURS - 16], *others}

    def told(self, peer: SimPeer, model: int, now: float) -> _Told:
        """What is known of ``peer`` now."""
        sim = self._sim
        rtt_s = sim.mesh.rtts[self.number][peer.number]
        if peer.number == self.number:
            at = now
        elif peer.number in self.neighbours:
            at = (now - rtt_s / 2) // TOLD_EVERY_S * TOLD_EVERY_S
        else:
            at = now - TOLD_AFTER_S
        since, loaded, ahead = peer.told(at)
        waits: tuple[Wait, ...] = ()
        if peer.number in self.neighbours or peer.number == self.number:
            ahead = peer.ahead(at)
            sequence = int(at / TOLD_EVERY_S)
            if model in loaded and (word := peer.waits.word(at)) is not None:
                waits = (Wait(sim.digests[model], word.wait_s, word.free, word.queued),)
        else:
            sequence = int(since / TOLD_EVERY_S)
        capacity = peer.hardware.capacity
        running = min(max(ahead, 0), capacity)
        state: PeerState = "self" if peer.number == self.number else self._state(peer, rtt_s, now)
        view, presence = sim.word(peer, loaded, state, model)
        return _Told(Load(running, max(ahead, 0) - running, capacity, waits=waits), sequence, view, presence)

    def _state(self, peer: SimPeer, rtt_s: float, now: float) -> PeerState:
        late_s = rtt_s if peer.number in self.neighbours else TOLD_AFTER_S
        for outage in reversed(peer.outages):
            if outage.down <= now:
                known = outage.down + late_s + (SILENT_S if outage.silent else 0.0)
                return "offline" if known <= now < outage.up + BACK_S else "online"
        return "online"

    def contenders(self, request: _Request, now: float) -> dict[int, tuple[Contender, _Told]]:
        """All that have the model, but those that failed this request."""
        sim, model = self._sim, request.conversation.model
        held = self.prefixes.held(sim.digests[model], sim.marks(request.conversation, request.turn), now)
        found = {}
        for number in sim.mesh.holders[model]:
            if number in request.tried:
                continue
            peer = sim.mesh.peers[number]
            told = self.told(peer, model, now)
            peer_id, digest = told.view.peer_id, sim.digests[model]
            load, sent = told.load, 0
            if number != self.number:
                load = self.outstanding.load(peer_id, told.sequence, told.load)
                sent = self.outstanding.since(peer_id, told.sequence)
            found[number] = (
                Contender(
                    told.view,
                    told.model,
                    load,
                    self.measurements.figures(peer_id, digest, told.model.device, now),
                    sim.mesh.rtts[self.number][number] if number in self.neighbours else None,
                    self.measurements.breakers.standing(peer_id, digest, now),
                    held.get(peer_id, 0),
                    self.waits.of(peer_id, digest, told.sequence, told.load, sent, now),
                ),
                told,
            )
        return found


class Simulation:
    """One run of a mesh under one policy."""

    def __init__(self, size: Size, chooser: Chooser) -> None:
        self.mesh: SimMesh = build_mesh(size)
        self.chooser: Chooser = chooser
        self.digests = [Sha256(f"{number:064x}") for number in range(size.models)]
        self.ids = [PeerId(peer.name) for peer in self.mesh.peers]
        self.entries = [Entry(self, number) for number in range(size.entries)]
        self.outcomes: list[Outcome] = []
        self.decisions = 0
        self.considered = 0
        self.deciding_s = 0.0
        self.now = 0.0
        self._weights = {p.name: 3.0 if p.hardware.gpu_bytes else 1.0 for p in self.mesh.peers}
        self._words: dict[tuple[int, frozenset[int]], tuple[PeerStatus, dict[int, ModelPresence]]] = {}
        self._views: dict[tuple[int, frozenset[int], PeerState], PeerView] = {}
        self._events: list[tuple[float, int, Any]] = []
        self._serial = 0

    def run(self) -> list[Outcome]:
        """All conversations, to their ends."""
        for conversation in self.mesh.conversations:
            self._at(conversation.starts_at, partial(self._on_turn, conversation, 0))
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return self.outcomes

    def _at(self, when: float, act: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, act))

    # --- words --------------------------------------------------------------------------------------------------------

    def word(
        self, peer: SimPeer, loaded: frozenset[int], state: PeerState, model: int
    ) -> tuple[PeerView, ModelPresence]:
        """What a peer with these models loaded says of itself."""
        found = self._words.get((peer.number, loaded))
        if found is None:
            found = self._words[peer.number, loaded] = self._status(peer, loaded)
        view = self._views.get((peer.number, loaded, state))
        if view is None:
            view = PeerView(self.ids[peer.number], state, "direct", found[0])
            self._views[peer.number, loaded, state] = view
        return view, found[1][model]

    def _status(self, peer: SimPeer, loaded: frozenset[int]) -> tuple[PeerStatus, dict[int, ModelPresence]]:
        models = {}
        for model in self.mesh.models:
            if peer.number not in self.mesh.holders[model.number]:
                continue
            prefill, decode = peer.rates(model, self.now)
            here = model.number in loaded
            models[model.number] = ModelPresence(
                self.digests[model.number],
                (),
                "loaded" if here else "disk",
                model.size,
                peer.device_of(model) if here else "gpu" if peer.hardware.gpu_bytes else "cpu",
                prefill_per_s=prefill,
                decode_per_s=decode,
                load_s=peer.load_s(model),
            )
        gpus: tuple[Gpu, ...] = ()
        if total := peer.hardware.gpu_bytes:
            used = sum(int(1.1 * m.size) for m in models.values() if m.state == "loaded" and m.device == "gpu")
            gpus = (Gpu("gpu", min(used, total), total),)
        name = self.ids[peer.number]
        status = PeerStatus(name, 1, 0, peer.name, "0", engine="llamacpp", models=tuple(models.values()), gpus=gpus)
        return status, models

    def marks(self, conversation: Conversation, turn: int) -> tuple[Mark, ...]:
        """The cuts of the prompt of a turn."""
        found: list[Mark] = []
        size = 0
        for index in range(turn + 1):
            asked, answer, _ = conversation.turns[index]
            size += asked
            found.append(Mark(b"%d/%d" % (conversation.number, 2 * index), size))
            size += answer
            if index < turn:
                found.append(Mark(b"%d/%d" % (conversation.number, 2 * index + 1), size, is_answer=True))
        return tuple(found)

    # --- a request ----------------------------------------------------------------------------------------------------

    def _on_turn(self, conversation: Conversation, turn: int) -> None:
        prompt = self.marks(conversation, turn)[-1].tokens
        request = _Request(conversation, turn, self.now, prompt, conversation.turns[turn][1], 0.0)
        best = self._best(request)
        request.best_s = best[0] if best else 0.0
        self._ask(request, best)

    def _model(self, request: _Request) -> SimModel:
        return self.mesh.models[request.conversation.model]

    def _best(self, request: _Request) -> tuple[float, int] | None:
        """The oracle's: seconds, and which peer."""
        rtts, model = self.mesh.rtts[request.conversation.entry], self._model(request)
        found: list[tuple[bool, float, int]] = []
        for number in self.mesh.holders[model.number]:
            peer = self.mesh.peers[number]
            peer.advance(self.now)
            if peer.outage_at(self.now):
                continue
            plan = peer.plan(self.now, model, request.conversation.number, request.prompt + request.said, request.left)
            found.append((plan.lost_s is not None, plan.end - self.now + rtts[number], number))
        return min(found)[1:] if found else None

    def _ask(self, request: _Request, best: tuple[float, int] | None) -> None:
        """Choose and ask; ``best`` is the oracle's choice as of now."""
        if self.chooser == "oracle":
            if best is None:
                self._at(self.now + 1.0, partial(self._again, request))
                return
            self._send(request, best[1], None, None)
            return
        entry = self.entries[request.conversation.entry]
        contenders = entry.contenders(request, self.now)
        decision = self._decide(entry, request, [contender for contender, _ in contenders.values()])
        if not decision.order:
            self._nobody(request)
            return
        number = int(decision.order[0][4:])
        contender, told = contenders[number]
        if not request.tried:
            request.estimate_s = decision.ranked[0].estimate_s
        if contender.model.state == "partial" or contender.view.state == "offline":
            request.bad += 1
        entry.previous[request.conversation.model] = decision.order[0]
        self._send(request, number, contender, told)

    def _decide(self, entry: Entry, request: _Request, contenders: list[Contender]) -> Decision:
        assert self.chooser != "oracle"
        model = request.conversation.model
        usual = entry.measurements.answer_tokens(self.digests[model])
        work = Work(request.prompt + request.said, max(1, int((usual or OUTPUT_TOKENS) - request.said)))
        self.decisions += 1
        self.considered += len(contenders)
        turn = entry.turns[model]
        entry.turns[model] += 1
        began = time.process_time()
        decision = decide(
            contenders,
            work,
            entry.previous.get(model),
            policy=self.chooser,
            weights=self._weights,
            turn=turn,
            key=b"%d" % request.conversation.number,
        )
        self.deciding_s += time.process_time() - began
        return decision

    def _nobody(self, request: _Request) -> None:
        """Wait a second and ask again, a few times."""
        if self.chooser == "local-only" or self.now - request.came_s > 60:
            self._done(request, -1, float("inf"))
            return
        request.tried = ()
        self._at(self.now + 1.0, partial(self._again, request))

    def _again(self, request: _Request) -> None:
        self._ask(request, self._best(request))

    def _send(self, request: _Request, number: int, contender: Contender | None, told: _Told | None) -> None:
        peer, entry = self.mesh.peers[number], self.entries[request.conversation.entry]
        rtt_s = self.mesh.rtts[entry.number][number]
        sequence = told.sequence if told else 0
        if contender:
            entry.measurements.breakers.on_probe_sent(self.ids[number], contender.model.digest, self.now)
            entry.outstanding.on_sent(self.ids[number], sequence)
            entry.neighbours.add(number)
        outage = peer.outage_at(self.now)
        if outage:
            late_s = NOTICED_S if outage.silent else rtt_s
            self._at(self.now + late_s, partial(self._on_lost, request, number, contender, sequence, 0))
            return
        prompt = request.prompt + request.said
        plan = peer.plan(self.now, self._model(request), request.conversation.number, prompt, request.left)
        peer.take(self.now, plan, self._model(request), request.conversation.number, prompt, request.left)
        if plan.lost_s is not None:
            silent = (lost := peer.outage_at(plan.lost_s)) is not None and lost.silent
            said = _said(plan, request.left)
            late_s = NOTICED_S if silent else rtt_s
            self._at(plan.lost_s + late_s, partial(self._on_lost, request, number, contender, sequence, said))
        else:
            done = partial(self._on_answer, request, number, contender, sequence, plan, self.now)
            self._at(plan.end + rtt_s, done)

    def _on_lost(self, request: _Request, number: int, contender: Contender | None, sequence: int, said: int) -> None:
        entry = self.entries[request.conversation.entry]
        request.failures += 1
        if contender:
            entry.outstanding.on_ended(self.ids[number], sequence, int(self.now / TOLD_EVERY_S))
            entry.measurements.breakers.on_failure(self.ids[number], None, "peer_gone", self.now)
            entry.prefixes.on_lost(self.ids[number])
        request.said += said
        request.left -= said
        request.tried = (*request.tried, number) if len(request.tried) < MAX_TRIES else ()
        self._again(request)

    def _on_answer(
        self, request: _Request, number: int, contender: Contender | None, sequence: int, plan: Plan, sent_s: float
    ) -> None:
        if contender:
            self._measure(request, number, contender, sequence, plan, sent_s)
        self._done(request, number, self.now - request.came_s)

    def _measure(
        self, request: _Request, number: int, contender: Contender, sequence: int, plan: Plan, sent_s: float
    ) -> None:
        """As services.router does."""
        entry, now, peer_id = self.entries[request.conversation.entry], self.now, self.ids[number]
        digest, device = contender.model.digest, contender.model.device
        measured, rtt_s = entry.measurements, self.mesh.rtts[entry.number][number]
        entry.outstanding.on_ended(peer_id, sequence, int((now - rtt_s / 2) / TOLD_EVERY_S))
        waited_s = plan.start - sent_s + plan.load_s + plan.prompt_s + rtt_s
        measured.on_rtt(peer_id, rtt_s, now)
        measured.on_answer(digest, request.left + request.said, now)
        prompt, load = request.prompt + request.said, contender.load
        measured.on_wait(peer_id, plan.start - sent_s, load, now)
        entry.waits.on_waited(peer_id, contender.told, plan.start - sent_s)
        measured.on_first_token(
            peer_id,
            digest,
            device,
            waited_s=waited_s,
            prompt_tokens=prompt - plan.cached,
            now=now,
            prompt_s=plan.prompt_s,
            size=contender.model.size,
        )
        measured.on_finish(
            peer_id,
            digest,
            device,
            tokens=request.left,
            span_s=plan.output_s,
            load_s=plan.load_s,
            now=now,
            beside=min(load.running + load.queued, load.capacity - 1),
            size=contender.model.size,
        )
        marks = self.marks(request.conversation, request.turn)
        entry.prefixes.on_answered(digest, marks, peer_id, contender.prefix_tokens, plan.cached, now)

    def _done(self, request: _Request, number: int, total_s: float) -> None:
        conversation, turn = request.conversation, request.turn
        self.outcomes.append(
            Outcome(
                conversation.number,
                turn,
                number,
                total_s,
                request.best_s,
                request.failures,
                request.bad,
                request.estimate_s,
            )
        )
        if turn + 1 < len(conversation.turns):
            self._at(self.now + conversation.turns[turn][2], partial(self._on_turn, conversation, turn + 1))


def _said(plan: Plan, left: int) -> int:
    """How many tokens there were when the peer was lost."""
    assert plan.lost_s is not None
    begun = plan.end - plan.output_s
    if plan.lost_s <= begun or plan.output_s <= 0:
        return 0
    return min(left - 1, int(left * (plan.lost_s - begun) / plan.output_s))
