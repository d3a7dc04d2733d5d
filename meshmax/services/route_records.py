"""What came of the last ROUTES_KEPT requests, those under way too: their Routes, never a word of a prompt."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask
from meshmax.base.route import Attempt, Candidate, RequestState, Route, Wait
from meshmax.core.delivery import Delivery
from meshmax.core.explain import WAS_STOPPED, explain, kind_of, plain_line
from meshmax.core.refusal import NobodyNow
from meshmax.core.routing import Decision

LOADS_KEPT: Final = 50  # of those that only loaded or unloaded a model here
ROUTES_KEPT: Final = 200  # requests that `why` can look back at


class RouteRecord:
    """What came of one request so far."""

    def __init__(self, ask: Ask, decision: Decision, tokens: int, core: Delivery, started_at_s: float) -> None:
        """``tokens``: how long an answer the estimates are for. ``started_at_s``: Unix time."""
        self.request_id = ask.request_id
        self._digest, self._name, self._tokens = ask.digest, ask.name, tokens  # not the ask, which holds the prompt
        self._kind = kind_of(ask)
        # None once it is over: the first holds the prompt, the second the statuses of all who have the model.
        self._core: Delivery | None = core
        self._decision: Decision | None = decision
        self._started_at_s = started_at_s
        self._told: tuple[object, Route] | None = None  # what was known when it was told last, and what was told
        self._final: Route | None = None

    def route(self) -> Route:
        """As of now."""
        core = self._core
        if core is None or self._decision is None:
            assert self._final is not None
            return self._final
        known = core.attempts(), core.waited(), core.first_speaker, core.first_token_s, core.finish, core.error
        if self._told is None or self._told[0] != known:  # its beginning goes to the log and to the client
            self._told = known, self._route(core, self._decision, "running", None)
        return self._told[1]

    def close(self, state: RequestState, total_s: float) -> Route:
        """It is over after ``total_s``."""
        if self._core is not None and self._decision is not None:
            self._final = self._route(self._core, self._decision, state, total_s)
            self._core = self._decision = self._told = None
        return self.route()

    def _route(self, core: Delivery, decision: Decision, state: RequestState, total_s: float | None) -> Route:
        attempts = core.attempts()
        chosen = core.first_speaker
        failed = {a.peer_id: a.error for a in attempts if a.error and a.error != "cancelled" and a.peer_id != chosen}
        asked_before = _before(attempts, chosen)
        candidates = tuple(_verdict(c, chosen, failed) for c in decision.candidates)
        names = {c.peer_id: c.name for c in candidates}
        tried = {a.peer_id: _code(a) for a in asked_before if a.error and a.error != "cancelled"}
        last = chosen or (attempts[-1].peer_id if attempts else PeerId(""))
        finish = core.finish
        refused = f"; {core.error.message}" if isinstance(core.error, NobodyNow) else ""
        return Route(
            request_id=self.request_id,
            digest=self._digest,
            peer_id=last,
            line=explain(
                candidates,
                chosen or PeerId(""),
                [(names.get(peer, ""), code) for peer, code in tried.items()],
                self._tokens,
                policy=decision.policy,
                among=len(decision.order) - len(failed.keys() & decision.order) if failed else len(decision.order),
                late=[a.peer_id for a in asked_before if a.error in ("", "cancelled")],
                over=state != "running",
            )
            + refused,
            candidates=candidates,
            attempts=attempts,
            waits=core.waited(),
            model=self._name,
            policy=decision.policy,
            state=state,
            started_at_s=self._started_at_s,
            first_token_s=core.first_token_s,
            total_s=total_s,
            prompt_tokens=finish.prompt_tokens if finish else 0,
            output_tokens=finish.output_tokens if finish else sum(attempt.tokens for attempt in attempts),
            kind=self._kind,
            among=len(decision.order),
            error=core.error.code if core.error else "",
            message=plain_line(core.error.message) if core.error else "",
        )


def _code(attempt: Attempt) -> str:
    return WAS_STOPPED if attempt.stopping else attempt.error


def later(route: Route, by_s: float, attempts: tuple[Attempt, ...] = (), waits: tuple[Wait, ...] = ()) -> Route:
    """``route`` as a client saw it that had come ``by_s`` before; ``attempts``, ``waits``: what there was until then."""
    replace = msgspec.structs.replace
    return replace(
        route,
        attempts=(*attempts, *(replace(attempt, at_s=attempt.at_s + by_s) for attempt in route.attempts)),
        waits=(*waits, *(replace(wait, at_s=wait.at_s + by_s) for wait in route.waits)),
        first_token_s=None if route.first_token_s is None else route.first_token_s + by_s,
        total_s=None if route.total_s is None else route.total_s + by_s,
    )


def _before(attempts: Sequence[Attempt], chosen: PeerId | None) -> Sequence[Attempt]:
    """Those that were sent before the one that began the answer; all of them where none has."""
    spoke = (at for at, a in enumerate(attempts) if a.peer_id == chosen and a.first_token_s is not None)
    at = next(spoke, len(attempts))
    return [a for a in attempts[:at] if a.peer_id != chosen]


def _verdict(candidate: Candidate, chosen: PeerId | None, failed: dict[PeerId, str]) -> Candidate:
    """The decision's verdict, or what the attempts showed: one at most is chosen, who began the answer once that is known."""
    if candidate.peer_id == chosen:
        return msgspec.structs.replace(candidate, verdict="chosen")
    code = failed.get(candidate.peer_id)
    if code is None:
        beaten = chosen is not None and candidate.verdict == "chosen"
        return msgspec.structs.replace(candidate, verdict="slower") if beaten else candidate
    return msgspec.structs.replace(candidate, verdict="busy" if code == "busy" else "failed")


class RouteRecords:
    """The last ROUTES_KEPT of them."""

    def __init__(self) -> None:
        self._records: deque[RouteRecord] = deque(maxlen=ROUTES_KEPT)

    def add(self, record: RouteRecord) -> None:
        """A request came."""
        self._records.append(record)

    def find(self, request_id: str) -> Route | None:
        """The newest request with this id, as of now."""
        found = (record for record in reversed(self._records) if record.request_id == request_id)
        record = next(found, None)
        return record.route() if record else None

    def routes(self) -> tuple[Route, ...]:
        """As of now, newest first."""
        return tuple(record.route() for record in reversed(self._records))


class LoadRecords:
    """The last LOADS_KEPT requests that only loaded or unloaded a model here: no peer was chosen for them."""

    def __init__(self) -> None:
        self._routes: OrderedDict[int, Route] = OrderedDict()
        self._count = 0

    @contextmanager
    def recorded(
        self, ask: Ask, peer_id: PeerId, line: str, started_at_s: float, now: Callable[[], float]
    ) -> Iterator[Route]:
        """The route of ``ask``, which is under way within the block. ``peer_id``: ours."""
        number, began_s = self._count, now()
        self._count += 1
        route = Route(
            ask.request_id,
            ask.digest,
            peer_id,
            line,
            attempts=(Attempt(peer_id),),
            model=ask.name,
            policy="local-only",
            started_at_s=started_at_s,
            kind=kind_of(ask),
        )
        self._routes[number] = route
        if len(self._routes) > LOADS_KEPT:
            self._routes.popitem(last=False)
        state: RequestState = "cancelled"
        attempt = Attempt(peer_id, "cancelled")
        code = message = ""
        try:
            yield route
            state, attempt = "done", Attempt(peer_id)
        except MeshmaxError as error:
            code, message = error.code, error.message
            state, attempt = "failed", Attempt(peer_id, code, message=message)
            raise
        finally:
            took_s = now() - began_s
            if number in self._routes:
                ended = msgspec.structs.replace(attempt, ended_s=took_s)
                self._routes[number] = msgspec.structs.replace(
                    route, state=state, total_s=took_s, attempts=(ended,), error=code, message=plain_line(message)
                )

    def find(self, request_id: str) -> Route | None:
        """The newest with this id."""
        return next((route for route in reversed(self._routes.values()) if route.request_id == request_id), None)

    def routes(self) -> tuple[Route, ...]:
        """As of now, newest first."""
        return tuple(reversed(self._routes.values()))
