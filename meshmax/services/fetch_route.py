"""How a prompt whose model is fetched first is told: the line of its header, its attempts, its route from the first moment.

Once the model is there the router's own route is told as its client saw it, later by as long as the fetch took. Not here:
the fetch (services.pull_first, services.shared_pulls), the sentences (core.why).
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.errors import Draining, MeshmaxError
from meshmax.base.inference import Ask
from meshmax.base.route import Attempt, Policy, RequestState, Route
from meshmax.core.explain import kind_of
from meshmax.core.pull_first import PullPlan, Taker
from meshmax.ports import Answer
from meshmax.services.route_records import later

CANDIDATES_KEPT: Final = 32  # of one request


class FetchRoute:
    """One request whose model is on its way to a peer. ``now``: of one monotonic clock, in seconds."""

    def __init__(self, ask: Ask, plan: PullPlan, model: str, policy: Policy, at_s: float, now: float) -> None:
        # Not the ask: it holds the prompt, and what came of a request is kept long after it.
        self.request_id, self._digest, self._name = ask.request_id, ask.digest, ask.name
        self._kind = kind_of(ask)
        self._plan, self.model, self._policy = plan, model, policy
        self.at_s, self.began_s = at_s, now  # Unix time, monotonic
        self.taker = plan.takers[0]
        self.begun = False  # whether somebody took it
        self._ended: list[Attempt] = []  # fetches that came to nothing
        self._taken_s = now
        self._took_s: float | None = None
        self._failed: MeshmaxError | None = None
        self.answer: Answer | None = None  # while the model is there and the answer is under way
        self._final: Route | None = None

    def on_taken(self, taker: Taker, now: float) -> None:
        """``taker`` fetches it, at first or after another one failed."""
        self.taker, self._taken_s = taker, now
        self._took_s = self._failed = None

    def on_failed(self, error: MeshmaxError, now: float) -> None:
        """The taker will not fetch it."""
        self._failed, self._took_s = error, now - self._taken_s
        self._ended.append(self._attempt())

    def on_fetched(self, now: float) -> None:
        """The model is there."""
        self._took_s = now - self._taken_s

    @property
    def line(self) -> str:
        """What goes on, for the header."""
        where = "this peer" if self.taker.ours else ascii_of(self.taker.name)
        if self._took_s is None:
            return f"fetching {ascii_of(self.model)} to {where} first"
        if self._failed is not None:
            return f"{ascii_of(self.model)} could not be fetched to {where} ({self._failed.code})"
        return f"fetched {ascii_of(self.model)} to {where} first, {self._took_s:.1f} s"

    @property
    def over(self) -> bool:
        """Whether the request has ended."""
        return self._final is not None

    def route(self) -> Route:
        """As of now."""
        if self._final is not None:
            return self._final
        return self._alone() if self.answer is None else self._onto(self.answer.route)

    def close(self, state: RequestState, total_s: float) -> None:
        """The request is over; what answered it says itself how. The first word counts."""
        if self._final is not None:
            return
        route = self.route()
        if self.answer is None or state == "failed":
            route = msgspec.structs.replace(route, state=state, total_s=total_s)
        self._final, self.answer = route, None  # which holds the prompt

    def _alone(self) -> Route:
        """The route while nobody answers yet."""
        others = [other.told for other in self._plan.takers if other is not self.taker]
        chosen = msgspec.structs.replace(self.taker.told, verdict="chosen")
        known = {each.peer_id: each for each in (*self._plan.holders, *others, chosen)}  # holders of parts may take it
        del known[chosen.peer_id]
        return Route(
            self.request_id,
            self._digest,
            self.taker.peer_id,
            self.line,
            (chosen, *known.values())[:CANDIDATES_KEPT],
            self._attempts(),
            model=self._name,
            policy=self._policy,
            started_at_s=self.at_s,
            kind=self._kind,
        )

    def _attempts(self) -> tuple[Attempt, ...]:
        """The fetches as `meshmax why` tells them."""
        return tuple(self._ended) if self._failed else (*self._ended, self._attempt())

    def _attempt(self) -> Attempt:
        code, message = (self._failed.code, self._failed.message) if self._failed else ("", "")
        at_s = self._taken_s - self.began_s
        stopping = isinstance(self._failed, Draining) and self._failed.stopping
        return Attempt(
            self.taker.peer_id,
            code,
            kind="fetch",
            at_s=at_s,
            ended_s=self._took_s,
            message=message,
            stopping=stopping,
        )

    def _onto(self, route: Route) -> Route:
        """``route``, which began when the fetch had ended, as the client saw it."""
        took_s = self._taken_s - self.began_s + (self._took_s or 0.0)
        told = later(route, took_s, attempts=self._attempts())
        return msgspec.structs.replace(told, line=f"{self.line}; {route.line}", started_at_s=self.at_s)


def ascii_of(text: str) -> str:
    """A name as a header can carry it."""
    return "".join(c if c.isascii() and c.isprintable() and c not in ",;" else "?" for c in text[:200])
