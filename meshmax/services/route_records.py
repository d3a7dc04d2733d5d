"""What came of the last ROUTES_KEPT requests, those under way too: their Routes, never a word of a prompt."""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask
from meshmax.base.route import Candidate, RequestState, Route
from meshmax.core.delivery import Delivery
from meshmax.core.explain import explain
from meshmax.core.routing import Decision

ROUTES_KEPT: Final = 200  # requests that `why` can look back at


class RouteRecord:
    """What came of one request so far."""

    def __init__(self, ask: Ask, decision: Decision, tokens: int, core: Delivery, started_at_s: float) -> None:
        """``tokens``: how long an answer the estimates are for. ``started_at_s``: Unix time."""
        self.request_id = ask.request_id
        self._digest, self._name, self._tokens = ask.digest, ask.name, tokens  # not the ask, which holds the prompt
        # None once it is over: the first holds the prompt, the second the statuses of all who have the model.
        self._core: Delivery | None = core
        self._decision: Decision | None = decision
        self._started_at_s = started_at_s
        self._final: Route | None = None

    def route(self) -> Route:
        """As of now."""
        if self._core is None or self._decision is None:
            assert self._final is not None
            return self._final
        return self._route(self._core, self._decision, "running", None)

    def close(self, state: RequestState, total_s: float) -> Route:
        """It is over after ``total_s``."""
        if self._core is not None and self._decision is not None:
            self._final = self._route(self._core, self._decision, state, total_s)
            self._core = self._decision = None
        return self.route()

    def _route(self, core: Delivery, decision: Decision, state: RequestState, total_s: float | None) -> Route:
        attempts = core.attempts()
        chosen = core.first_speaker
        failed = {a.peer_id: a.error for a in attempts if a.error and a.error != "cancelled" and a.peer_id != chosen}
        candidates = tuple(_verdict(c, chosen, failed) for c in decision.candidates)
        names = {c.peer_id: c.name for c in candidates}
        tried = [(names.get(peer, ""), code) for peer, code in failed.items()]
        last = chosen or (attempts[-1].peer_id if attempts else PeerId(""))
        finish = core.finish
        return Route(
            request_id=self.request_id,
            digest=self._digest,
            peer_id=last,
            line=explain(
                candidates,
                chosen or PeerId(""),
                tried,
                self._tokens,
                policy=decision.policy,
                among=len(decision.order),
            ),
            candidates=candidates,
            attempts=attempts,
            model=self._name,
            policy=decision.policy,
            state=state,
            started_at_s=self._started_at_s,
            first_token_s=core.first_token_s,
            total_s=total_s,
            prompt_tokens=finish.prompt_tokens if finish else 0,
            output_tokens=finish.output_tokens if finish else sum(attempt.tokens for attempt in attempts),
        )


def _verdict(candidate: Candidate, chosen: PeerId | None, failed: dict[PeerId, str]) -> Candidate:
    """The decision's verdict, or what the attempts showed."""
    if candidate.peer_id == chosen:
        return msgspec.structs.replace(candidate, verdict="chosen")
    code = failed.get(candidate.peer_id)
    if code is None:
        return candidate
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
