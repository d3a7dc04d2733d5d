"""Sends each request to the peer that will answer it soonest, and keeps the answer coming. Satisfies ports.Router.

Decides nothing: core.routing puts the peers in order, core.delivery says who is asked when, core.measurements remembers.
Here: what they need to know of one request, and the record of what came of it. Owns no tasks: a request's own run in the
nursery of its block (services.delivery), and leaving it cancels the work wherever it is done. Not here: who the candidates
are (services.contenders), asking (services.trial).
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Final

import msgspec
import trio

from meshmax.base.config import RoutingConfig
from meshmax.base.errors import EngineError, MeshmaxError, ModelNotFound, NoProviders
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, RoutedEvent, is_load_only
from meshmax.base.route import RequestState, Route, Verdict, Wishes
from meshmax.core.backoff import Random
from meshmax.core.contender import Contender
from meshmax.core.delivery import Delivery
from meshmax.core.delivery_words import Choice, Start
from meshmax.core.eligibility import rest_of
from meshmax.core.hedging import Budget
from meshmax.core.measurements import Measurements
from meshmax.core.pace import Paces
from meshmax.core.policies import Judged
from meshmax.core.prefixes import marks_of
from meshmax.core.routing import Decision, decide, expected_work
from meshmax.ports import Catalog, Presence, Residency, Swarm
from meshmax.ports.services import WISHES
from meshmax.services.contenders import Contenders
from meshmax.services.delivery import RequestDelivery, open_delivery
from meshmax.services.infer_server import Precedence
from meshmax.services.route_records import RouteRecord, RouteRecords
from meshmax.services.trial import Bench, Trial
from meshmax.services.waiting import Waiting
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import HEDGES, REQUESTS

CHOICES: Final = 16  # peers that are looked at for one attempt: twice as many as are asked without success
LAST_KEPT: Final = 256  # models whose last choice is remembered
FORGETS: Final = ("peer_gone", "connect", "engine_crashed")  # codes of errors after which an engine holds nothing
ECHO: Final = "echo"  # says the same to the same request whatever its options

_log = get_logger("router")


class RoutedAnswer:
    """An answer under way; satisfies ports.Answer."""

    def __init__(self, record: RouteRecord, events: AsyncIterator[RoutedEvent]) -> None:
        self._record = record
        self.events = events

    @property
    def route(self) -> Route:
        """The decision, and what came of it until now."""
        return self._record.route()


class MeshRouter:
    """Satisfies ports.Router; made by `open_router`."""

    def __init__(
        self,
        swarm: Swarm,
        residency: Residency,
        catalog: Catalog,
        presence: Presence,
        peer_id: PeerId,
        precedence: Precedence = nullcontext,
        config: RoutingConfig = RoutingConfig(),  # noqa: B008  frozen
        *,
        jitter: Random | None = None,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        """``precedence``: entered for as long as a prompt waits for its first event. ``jitter``: of pauses."""
        self._jitter = jitter or random.Random()
        self.measurements = Measurements(self._jitter)
        bench = Bench(swarm, residency, presence, peer_id, self.measurements)
        self.outstanding = bench.outstanding
        self._shared = _Shared(bench, Contenders(bench, residency, catalog, presence), config)
        self._records = RouteRecords()
        self._catalog, self._precedence = catalog, precedence
        self._config, self._unix_now = config, unix_now

    def routes(self) -> tuple[Route, ...]:
        """The last requests, newest first, those under way too."""
        return self._records.routes()

    def route(self, request_id: str) -> Route | None:
        """The newest request with this id, where it is remembered."""
        return self._records.find(request_id)

    def on_news(self) -> None:
        """A peer came, went or said something new. Cheap where no request waits and nobody failed lately."""
        self._shared.bench.comebacks.look()
        self._shared.waiting.on_news()

    @asynccontextmanager
    async def open_answer(self, ask: Ask, wishes: Wishes = WISHES) -> AsyncIterator[RoutedAnswer]:
        """See ports.Router."""
        began, started_at_s = trio.current_time(), self._unix_now()
        request = _Request(self._shared, ask, wishes)
        decision = request.decision
        if not (decision.order or decision.resting or request.gone(decision)):
            raise self._nobody(ask, decision)
        core = Delivery(
            ask.request,
            request,
            self._jitter,
            began,
            alarms=self._shared.paces.alarms,
            deadline_s=self._config.deadline_s,
            model=ask.name,
            hedge=self._config.hedge and ask.priority == "interactive" and not is_load_only(ask.request),
        )
        record = RouteRecord(ask, decision, request.work.output_tokens, core, started_at_s)
        self._records.add(record)
        self._shared.budget.on_request()
        try:
            async with open_delivery(core, request.trial_for, request.on_waits) as delivery:
                with self._precedence():
                    await delivery.wait_first()
                self._on_begun(ask, core, record)
                yield RoutedAnswer(record, delivery)
        finally:
            request.on_ended(core)
            core.close(trio.current_time())
            _count_hedges(core)
            state: RequestState = "done" if core.finish else "failed" if core.error else "cancelled"
            record.close(state, trio.current_time() - began)

    def _on_begun(self, ask: Ask, core: Delivery, record: RouteRecord) -> None:
        if core.first_speaker is not None:
            self._shared.remember(ask.digest, core.first_speaker)
        route = record.route()
        _log.info("routed", request_id=route.request_id, peer=route.peer_id, why=route.line)

    def _nobody(self, ask: Ask, decision: Decision) -> MeshmaxError:
        REQUESTS.labels(where="nowhere", outcome="failed").inc()
        if decision.candidates:
            whom = "; ".join(f"{c.name or c.peer_id}: {c.why}" for c in decision.candidates[:4])
            return NoProviders(f"no peer that can be reached has model '{ask.name}' ready ({whom})")
        if any(entry.digest == ask.digest for entry in self._catalog.entries()):
            return NoProviders(f"no peer that can be reached has model '{ask.name}'")
        return ModelNotFound(f"model '{ask.name}' not found")


class _Shared:
    """What the requests of one node share."""

    def __init__(self, bench: Bench, contenders: Contenders, config: RoutingConfig) -> None:
        self.bench, self.contenders, self.config = bench, contenders, config
        self.waiting = Waiting(contenders.stand)
        bench.on_news = self.waiting.on_news
        self.paces = Paces()
        self.budget = Budget()
        self._last: OrderedDict[Sha256, tuple[PeerId | None, int]] = OrderedDict()

    def take_turn(self, digest: Sha256) -> tuple[PeerId | None, int]:
        """A request for a model came: who answered the last one, and how many came before."""
        peer, turn = self._last.pop(digest, (None, 0))
        self._last[digest] = (peer, turn + 1)
        if len(self._last) > LAST_KEPT:
            self._last.popitem(last=False)
        return peer, turn

    def remember(self, digest: Sha256, peer: PeerId) -> None:
        """``peer`` answers a request for the model."""
        if known := self._last.get(digest):
            self._last[digest] = (peer, known[1])


class _Request:
    """One request as core.delivery wants to know of it: satisfies its Chooser."""

    def __init__(self, shared: _Shared, ask: Ask, wishes: Wishes) -> None:
        self._shared, self._ask = shared, ask
        self._policy = wishes.policy or shared.config.policy
        self._marks = marks_of(ask.request)
        self._previous, self._turn = shared.take_turn(ask.digest)
        measured = shared.bench.measurements
        self.work = expected_work(ask.request, measured.answer_tokens(ask.digest))
        self._contenders: dict[PeerId, Contender] = {}
        self.decision = self._decide()
        self._fresh = True  # the decision is of this moment

    def choices(self) -> Sequence[Choice]:
        """See Chooser."""
        if not self._fresh:
            decision = self._decide()
        else:
            decision, self._fresh = self.decision, False
        choices = [self._choice(one) for one in decision.ranked[:CHOICES]]
        if decision.resting and len(choices) < CHOICES:
            resting = {judged.peer_id: (judged, verdict) for judged, verdict, _ in decision.out}
            more = (resting[peer] for peer in decision.resting[: CHOICES - len(choices)])
            choices += [self._resting(judged, verdict) for judged, verdict in more]
        if not decision.order and len(choices) < CHOICES:
            choices += [self._resting(judged, "excluded") for judged in self.gone(decision)[: CHOICES - len(choices)]]
        if is_load_only(self._ask.request) and self._ask.keep_alive_s == 0:
            choices.sort(key=lambda choice: not choice.ours)  # to unload means here: others' memory is theirs
        return choices

    def gone(self, decision: Decision) -> list[Judged]:
        """Who was lost a moment ago and may be back the next: services.presence shows them no longer than that."""
        if self._policy == "local-only":
            return []
        return [
            one for one, verdict, _ in decision.out if verdict == "excluded" and one.contender.view.state == "offline"
        ]

    def may_hedge(self, lateness: int) -> bool:
        """See Chooser."""
        return self._shared.budget.try_spend(lateness)

    def trial_for(self, start: Start) -> Trial:
        """How an attempt is made."""
        contender = self._contenders[start.choice.peer]
        ask = msgspec.structs.replace(self._ask, request=start.request)
        name = self._shared.contenders.name_of(contender)
        trial = Trial(self._shared.bench, ask, contender, name, start.choice.first_s)
        trial.begin()
        return trial

    def on_ended(self, core: Delivery) -> None:
        """The request is over: remember who holds the conversation now, and that who went away holds none any more."""
        attempts = core.attempts()
        for lost in {attempt.peer_id for attempt in attempts if attempt.error in FORGETS}:
            self._shared.contenders.prefixes.on_lost(lost)
        if core.refuted is not None:
            now = trio.current_time()
            self._shared.bench.measurements.breakers.on_failure(core.refuted, self._ask.digest, EngineError.code, now)
        spoke = [attempt for attempt in attempts if not attempt.error]
        if self._marks and spoke and core.finish is not None:
            peer = spoke[-1].peer_id
            believed = self._contenders[peer].prefix_tokens
            cached, now = core.finish.cached_tokens, trio.current_time()
            self._shared.contenders.prefixes.on_answered(self._ask.digest, self._marks, peer, believed, cached, now)

    def _decide(self) -> Decision:
        self._contenders |= (contenders := self._shared.contenders.of(self._ask, self._marks))
        return decide(
            contenders.values(),
            self.work,
            self._previous,
            policy=self._policy,
            weights=self._shared.config.weights,
            turn=self._turn,
            key=self._marks[0].hash if self._marks else b"",
        )

    def on_waits(self, delivery: RequestDelivery, begins: bool) -> None:
        """Nobody can be asked for it now, or (not ``begins``) it waits no more."""
        (self._shared.waiting.add if begins else self._shared.waiting.discard)(self._ask, delivery)

    def _resting(self, judged: Judged, verdict: Verdict) -> Choice:
        contender = judged.contender
        rests, from_s = rest_of(contender, verdict, trio.current_time())
        name = self._shared.contenders.name_of(contender)
        return msgspec.structs.replace(
            self._choice(judged),
            from_s=from_s,
            rests=rests,
            name=name,
            code=contender.standing.code,
            reason=contender.standing.reason,
        )

    def _choice(self, judged: Judged) -> Choice:
        contender, parts = judged.contender, judged.figures
        peer, status = judged.peer_id, contender.view.status
        first_s = parts.rtt_s + parts.queue_s + parts.load_s + parts.prompt_s
        return Choice(
            peer=peer,
            gaps=self._shared.paces.of(peer, self._ask.digest, judged.device),
            frames=self._shared.paces.frames(peer),
            first_s=first_s,
            late_s=self._shared.bench.first_tokens.late_s(peer, first_s),
            rtt_s=parts.rtt_s,
            ours=peer == self._shared.bench.peer_id,
            deterministic=status is not None and status.engine == ECHO,
        )


def _count_hedges(core: Delivery) -> None:
    for attempt in core.attempts():
        if attempt.kind == "hedge":
            HEDGES.labels(outcome="won" if attempt.peer_id == core.first_speaker else "lost").inc()


@asynccontextmanager
async def open_router(
    swarm: Swarm,
    residency: Residency,
    catalog: Catalog,
    presence: Presence,
    peer_id: PeerId,
    precedence: Precedence = nullcontext,
    config: RoutingConfig = RoutingConfig(),  # noqa: B008  frozen
    *,
    jitter: Random | None = None,
    unix_now: Callable[[], float] = time.time,
) -> AsyncIterator[MeshRouter]:
    """A router over what is here and who is there. ``peer_id`` is ours."""
    yield MeshRouter(swarm, residency, catalog, presence, peer_id, precedence, config, jitter=jitter, unix_now=unix_now)
