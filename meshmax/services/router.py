"""Sends each request to the peer that will answer it soonest. Satisfies ports.Router.

Core: core.routing decides, core.measurements remembers. Here: who the candidates are, asking one after the other until
the first event is there (the client sees none of it), measuring, and the record of each decision. An answer of our own
does not touch the wire. After the first event a failure is the caller's to see. Owns no tasks: everything runs in the
task of the request, and leaving it cancels the work wherever it is done.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import Final

import msgspec
import trio

from meshmax.base.errors import (
    Busy,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    FirstTokenTimeout,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    PeerGone,
    Retry,
    StoreError,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, Delta, EmbedRequest, Event, Finish, is_load_only
from meshmax.base.route import Attempt, Candidate, Route, Wishes
from meshmax.base.status import NO_ENGINE, Device, ModelPresence, PeerView
from meshmax.core.measurements import MIN_LOAD_S, Measurements
from meshmax.core.routing import Contender, Decision, Outstanding, decide, expected_work, explain, holders, plain_name
from meshmax.ports import Catalog, Presence, Residency, Swarm
from meshmax.ports.services import WISHES
from meshmax.services.infer_client import open_remote_answer
from meshmax.services.infer_server import Precedence
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import FIRST_TOKEN, REQUESTS

ROUTES_KEPT: Final = 200  # decisions that `why` can look back at
CANDIDATES_KEPT: Final = 32  # of one decision; the best ones
MAX_ATTEMPTS: Final = 8  # peers asked for one request; a request that eight peers fail would fail everywhere
FIRST_EVENT_DEADLINE_S: Final = 600.0  # keep-alives and no event: as long as the longest load and a full queue may take
PREVIOUS_KEPT: Final = 256  # models whose last choice is remembered
CONTENDED: Final = 0.2  # share of time spent in the caller above which a decode rate says nothing about the peer

_OF_ONE_PEER: Final = (PeerGone, EngineError, EngineUnavailable, EngineCrashed)  # another one might do better

_log = get_logger("router")


class RoutedAnswer:
    """An answer under way; satisfies ports.Answer."""

    def __init__(self, route: Route, events: AsyncIterator[Event]) -> None:
        self.route = route
        self.events = events


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
    ) -> None:
        """``precedence``: entered for as long as a prompt waits for its first event."""
        self._swarm = swarm
        self._precedence = precedence
        self._residency = residency
        self._catalog = catalog
        self._presence = presence
        self._peer_id = peer_id
        self._previous: OrderedDict[Sha256, PeerId] = OrderedDict()
        self._routes: deque[Route] = deque(maxlen=ROUTES_KEPT)
        self.measurements = Measurements()
        self.outstanding = Outstanding()

    def routes(self) -> tuple[Route, ...]:
        """The last ROUTES_KEPT decisions, newest first."""
        return tuple(reversed(self._routes))

    @asynccontextmanager
    async def open_answer(self, ask: Ask, wishes: Wishes = WISHES) -> AsyncIterator[RoutedAnswer]:
        """See ports.Router."""
        contenders = self._contenders(ask.digest)
        work = expected_work(ask.request, self.measurements.answer_tokens(ask.digest))
        decision = decide(contenders.values(), work, self._previous.get(ask.digest))
        record = _Record(ask, decision, work.output_tokens)
        if not (decision.order or decision.resting):
            raise self._nobody(ask, decision)
        errors: list[MeshmaxError] = []
        for peer in self._order(ask, decision):
            trial, failure = _Trial(self, ask, contenders[peer]), None
            # Outside the stack: what an answer opens may hold scopes of its own for as long as it lasts.
            with trio.CancelScope(deadline=trio.current_time() + FIRST_EVENT_DEADLINE_S) as patience:
                async with AsyncExitStack() as stack:
                    try:
                        with self._precedence():
                            first = await trial.begin(stack)
                    except MeshmaxError as error:
                        failure = error
                    else:
                        patience.deadline = math.inf
                        record.answered(peer, trial.first_event_s)
                        self._remember(ask.digest, peer)
                        self._keep(record.route())
                        yield RoutedAnswer(record.route(), trial.events(first))
                        return
            errors.append(failure or trial.late())
            record.failed(peer, errors[-1])
            if _is_final(errors[-1], peer == self._peer_id):
                break
        self._keep(record.route())
        raise _most_telling(errors)

    # --- candidates --------------------------------------------------------------------------------------------------

    def _contenders(self, digest: Sha256) -> dict[PeerId, Contender]:
        now = trio.current_time()
        views = self._presence.peers()
        found = {view.peer_id: (view, model) for view, model in holders(views, digest)}
        own = self._own(digest, views, found.pop(self._peer_id, None))
        if own is not None:
            found[self._peer_id] = own
        return {peer: self._contender(view, model, now) for peer, (view, model) in found.items()}

    def _own(
        self, digest: Sha256, views: tuple[PeerView, ...], stated: tuple[PeerView, ModelPresence] | None
    ) -> tuple[PeerView, ModelPresence] | None:
        """Ourselves, as we are now: our own status is a moment old and may lack a model that has just come."""
        view = next((view for view in views if view.peer_id == self._peer_id), None)
        if view is None or view.status is None or view.status.engine == NO_ENGINE:
            return None
        model = stated[1] if stated and stated[1].state != "partial" else None
        if model is None:
            entry = next((e for e in self._catalog.entries() if e.digest == digest and e.local), None)
            if entry is None:
                return None
            model = ModelPresence(digest, (entry.name,), "disk", entry.size, _device(view))
        loaded = next((m for m in self._residency.loaded() if m.digest == digest), None)
        if loaded is not None:
            return view, msgspec.structs.replace(model, state="loaded", device=loaded.device)
        return view, msgspec.structs.replace(model, state="disk")

    def _contender(self, view: PeerView, model: ModelPresence, now: float) -> Contender:
        peer, status = view.peer_id, view.status
        assert status is not None  # holders() and _own() say so
        if peer == self._peer_id:
            load = self._residency.load()
        else:
            load = self.outstanding.load(peer, status.sequence, status.load)
            if view.rtt_s is not None:
                self.measurements.on_rtt(peer, view.rtt_s, now)
        return Contender(
            view=view,
            model=model,
            load=load,
            figures=self.measurements.figures(peer, model.digest, model.device, now),
            rtt_s=self.measurements.rtt_s(peer),
            standing=self.measurements.standing(peer, model.digest, now),
        )

    def _order(self, ask: Ask, decision: Decision) -> list[PeerId]:
        order = [*decision.order, *decision.resting]
        if is_load_only(ask.request) and ask.keep_alive_s == 0 and self._peer_id in order:
            # To unload means here, where we can: others' memory is theirs.
            order.remove(self._peer_id)
            order.insert(0, self._peer_id)
        return order[:MAX_ATTEMPTS]

    def _nobody(self, ask: Ask, decision: Decision) -> MeshmaxError:
        REQUESTS.labels(where="nowhere", outcome="failed").inc()
        if decision.candidates:
            whom = "; ".join(f"{c.name or c.peer_id}: {c.why}" for c in decision.candidates[:4])
            return NoProviders(f"no peer that can be reached has model '{ask.name}' ready ({whom})")
        if any(entry.digest == ask.digest for entry in self._catalog.entries()):
            return NoProviders(f"no peer that can be reached has model '{ask.name}'")
        return ModelNotFound(f"model '{ask.name}' not found")

    # --- what trials use ---------------------------------------------------------------------------------------------

    def open_at(self, peer: PeerId, ask: Ask) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The answer of one peer, ourselves too."""
        if peer == self._peer_id:
            return self._residency.open_answer(ask)
        return open_remote_answer(self._swarm, peer, ask)

    def name_of(self, contender: Contender) -> str:
        """A peer as people call it; '' for ourselves."""
        view = contender.view
        if view.peer_id == self._peer_id:
            return ""
        return plain_name(view.status.name) if view.status and view.status.name else view.peer_id

    def where(self, peer: PeerId) -> str:
        """The label of metrics: answers here or elsewhere."""
        return "local" if peer == self._peer_id else "remote"

    def sequence(self, peer: PeerId) -> int:
        """Of the newest status of ``peer``; 0 if there is none."""
        view = self._presence.view(peer)
        return view.status.sequence if view and view.status else 0

    def _remember(self, digest: Sha256, peer: PeerId) -> None:
        self._previous[digest] = peer
        self._previous.move_to_end(digest)
        if len(self._previous) > PREVIOUS_KEPT:
            self._previous.popitem(last=False)

    def _keep(self, route: Route) -> None:
        self._routes.append(route)
        _log.info("routed", request_id=route.request_id, peer=route.peer_id, why=route.line)


class _Record:
    """What came of a decision: its Route."""

    def __init__(self, ask: Ask, decision: Decision, tokens: int) -> None:
        self._ask = ask
        self._tokens = tokens
        self._candidates = decision.candidates
        self._attempts: list[Attempt] = []
        self._chosen: PeerId | None = None

    def failed(self, peer: PeerId, error: MeshmaxError) -> None:
        self._attempts.append(Attempt(peer, error.code))

    def answered(self, peer: PeerId, first_event_s: float) -> None:
        self._attempts.append(Attempt(peer, "", first_event_s))
        self._chosen = peer

    def route(self) -> Route:
        failed = {attempt.peer_id: attempt.error for attempt in self._attempts if attempt.error}
        candidates = tuple(self._verdict(c, failed) for c in self._candidates)
        names = {c.peer_id: c.name for c in candidates}
        tried = [(names[peer], code) for peer, code in failed.items()]
        line = explain(candidates, self._chosen or PeerId(""), tried, self._tokens)
        last = self._chosen or (self._attempts[-1].peer_id if self._attempts else PeerId(""))
        kept = candidates[:CANDIDATES_KEPT]
        return Route(self._ask.request_id, self._ask.digest, last, line, kept, tuple(self._attempts))

    def _verdict(self, candidate: Candidate, failed: dict[PeerId, str]) -> Candidate:
        """The decision's verdict, or what the attempt showed."""
        if candidate.peer_id == self._chosen:
            return msgspec.structs.replace(candidate, verdict="chosen")
        code = failed.get(candidate.peer_id)
        if code is None:
            return candidate
        return msgspec.structs.replace(candidate, verdict="busy" if code == "busy" else "failed")


class _Trial:
    """One request at one peer: asks, measures, counts."""

    def __init__(self, router: MeshRouter, ask: Ask, contender: Contender) -> None:
        self._router = router
        self._ask = ask
        self._contender = contender
        self._peer = contender.view.peer_id
        self._source: AsyncIterator[Event] | None = None
        self._sent_s = trio.current_time()
        self._outcome = "cancelled"
        self.first_event_s = 0.0  # 0 until it is there

    async def begin(self, stack: AsyncExitStack) -> Event:
        """The first event. ``stack`` then holds the answer, and ends it. Raises what the peer or the engine says."""
        sequence = self._router.sequence(self._peer)
        self._router.outstanding.on_sent(self._peer, sequence)
        stack.callback(self._end, sequence)
        try:
            self._source = await stack.enter_async_context(self._router.open_at(self._peer, self._ask))
            first = await anext(self._source, None)
            if first is None:
                raise PeerGone("the answer ended before it began")
        except MeshmaxError as error:
            self.on_error(error)
            raise self.named(error) from None
        self.first_event_s = trio.current_time() - self._sent_s
        FIRST_TOKEN.labels(where=self._router.where(self._peer)).observe(self.first_event_s)
        return first

    def named(self, error: MeshmaxError) -> MeshmaxError:
        """``error`` with the peer's name where it speaks of that peer's connection or engine."""
        name = self._router.name_of(self._contender)
        if not name or type(error) not in _OF_ONE_PEER:
            return error
        if isinstance(error, PeerGone) and self.first_event_s:
            return PeerGone(f"{name} went away in the middle of its answer: ask again")
        return type(error)(f"{name}: {error.message}")

    def late(self) -> FirstTokenTimeout:
        """The error of a trial that FIRST_EVENT_DEADLINE_S ended."""
        error = FirstTokenTimeout(f"the answer did not begin within {FIRST_EVENT_DEADLINE_S:g} s")
        self.on_error(error)
        return error

    def events(self, first: Event) -> AsyncIterator[Event]:
        """Every event, the first again, measured on the way."""
        assert self._source is not None
        return _MeasuredEvents(first, self._source, self)

    def on_finish(self, finish: Finish, tokens: int, span_s: float, fair: bool) -> None:
        """The answer is whole: ``tokens`` came in ``span_s`` after the first event; ``fair``: the caller did not slow it."""
        self._outcome = "ok"
        model, now, measured = self._contender.model, trio.current_time(), self._router.measurements
        if is_load_only(self._ask.request):
            measured.on_success(self._peer, model.digest, now)
            return
        load_s = min(finish.load_s, self.first_event_s)
        if finish.done_reason == "stop" and finish.output_tokens > 0:
            measured.on_answer(model.digest, finish.output_tokens, now)
        # Vectors come as each text is read, so the prompt is read when the last one is there.
        embeds = isinstance(self._ask.request, EmbedRequest)
        if model.state == "loaded" and self._free and load_s < MIN_LOAD_S and (fair or not embeds):
            measured.on_first_token(
                self._peer,
                model.digest,
                model.device,
                waited_s=self.first_event_s + (span_s if embeds else 0.0),
                prompt_tokens=finish.prompt_tokens - finish.cached_tokens,
                now=now,
            )
        measured.on_finish(
            self._peer,
            model.digest,
            model.device,
            tokens=tokens if fair else 0,
            span_s=span_s,
            load_s=load_s,
            now=now,
        )

    @property
    def _free(self) -> bool:
        load = self._contender.load
        return load.running + load.queued < load.capacity

    def on_error(self, error: MeshmaxError) -> None:
        """The peer or the engine failed, before the first event or after it."""
        self._outcome = "failed"
        if error.retry is Retry.NEVER and not isinstance(error, StoreError):
            return  # it speaks of the request, not of the peer
        # An engine's failure is that of one model; anything else (connection, protocol, load) is the peer's.
        digest = (
            None if error.code in ("peer_gone", "connect", "version_mismatch", "remote_protocol") else self._ask.digest
        )
        pause_s = error.retry_after_s if isinstance(error, Busy) else 0.0
        self._router.measurements.on_failure(self._peer, digest, error.code, trio.current_time(), pause_s)

    def _end(self, sequence: int) -> None:
        self._router.outstanding.on_ended(self._peer, sequence, self._router.sequence(self._peer))
        late = self._outcome == "cancelled" and trio.current_time() - self._sent_s >= FIRST_EVENT_DEADLINE_S
        outcome = "failed" if late and not self.first_event_s else self._outcome
        REQUESTS.labels(where=self._router.where(self._peer), outcome=outcome).inc()


class _MeasuredEvents:
    """Events on their way to the caller. Counts tokens, and how much of the time was the caller's own."""

    def __init__(self, first: Event, source: AsyncIterator[Event], trial: _Trial) -> None:
        self._first: Event | None = first
        self._source = source
        self._trial = trial
        self._started_s = self._returned_s = trio.current_time()
        self._caller_s = 0.0
        self._tokens = 0

    def __aiter__(self) -> _MeasuredEvents:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises what the peer or the engine says."""
        now = trio.current_time()
        if self._first is not None:
            event, self._first = self._first, None
            self._started_s = now
        else:
            self._caller_s += now - self._returned_s
            try:
                event = await anext(self._source)
            except MeshmaxError as error:
                self._trial.on_error(error)
                raise self._trial.named(error) from None
            if isinstance(event, Delta):
                self._tokens += event.tokens
        self._returned_s = trio.current_time()
        if isinstance(event, Finish):
            span_s = self._returned_s - self._started_s
            self._trial.on_finish(event, self._tokens, span_s, fair=self._caller_s <= CONTENDED * span_s)
        return event


def _device(view: PeerView) -> Device:
    return "gpu" if view.status and view.status.gpus else "cpu"


def _is_final(error: MeshmaxError, ours: bool) -> bool:
    """Whether asking another peer cannot help. A disk's failure, or a word that we do not know, is that one peer's."""
    if error.retry is not Retry.NEVER or isinstance(error, StoreError):
        return False
    return ours or type(error) is not MeshmaxError


def _most_telling(errors: list[MeshmaxError]) -> MeshmaxError:
    """One that speaks of the request itself; Busy if all were, with the shortest wait; else the last that was not."""
    others = [error for error in errors if not isinstance(error, Busy)]
    if others:
        return others[-1]
    return min((e for e in errors if isinstance(e, Busy)), key=lambda e: e.retry_after_s)


@asynccontextmanager
async def open_router(
    swarm: Swarm,
    residency: Residency,
    catalog: Catalog,
    presence: Presence,
    peer_id: PeerId,
    precedence: Precedence = nullcontext,
) -> AsyncIterator[MeshRouter]:
    """A router over what is here and who is there. ``peer_id`` is ours."""
    yield MeshRouter(swarm, residency, catalog, presence, peer_id, precedence)
