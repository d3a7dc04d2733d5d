"""What became of the last EARLY_KEPT prompts that waited or were refused before the router had them; never a word of a prompt.

Rules. One that is known at once leaves no record here: the router's own tells all. One that waited first (a search far away, a
holder that was lost just now, a registry) is told from the first moment; what the router tells of it then is told as its client
saw it, later by as long as that took. Of several tries under one id the newest counts. Not here: what came of requests that
were routed (services.route_records), the sentences (core.why).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

import msgspec

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Policy, RequestKind, Route, Wait
from meshmax.core.explain import plain_line
from meshmax.services.route_records import later

EARLY_KEPT: Final = 100  # of some hundred bytes; apart from those that were routed, which a crowd must not push out
MAX_MODEL: Final = 200  # characters of a name
NO_WAIT_S: Final = 0.05  # what takes less is no wait to a person


class Early(msgspec.Struct, frozen=True):
    """What is known of a prompt from its first moment. ``model``: as it was typed."""

    request_id: str
    model: str
    policy: Policy = "latency"
    kind: RequestKind = "text"


class EarlyRecord:
    """One prompt that the router does not have, or did not have at once. ``now``: monotonic seconds."""

    def __init__(self, early: Early, started_at_s: float, now: Callable[[], float]) -> None:
        """``started_at_s``: Unix time."""
        self._early, self._started_at_s, self._now = early, started_at_s, now
        self._began_s = now()
        self._ended_s: float | None = None
        self._waits: list[Wait] = []
        self._code = self._message = ""  # not the error, whose traceback holds the prompt
        self.client_left = False  # while it waited
        self.state: Literal["running", "failed", "cancelled", "routed"] = "running"

    @contextmanager
    def waiting(self, why: str) -> Iterator[None]:
        """Within the block it waits. ``why``: a clause."""
        number, at_s = len(self._waits), self._now() - self._began_s
        self._waits.append(Wait(at_s, None, why))
        try:
            yield
        finally:
            took_s = self._now() - self._began_s - at_s
            del self._waits[number:]
            if took_s >= NO_WAIT_S:
                self._waits.append(Wait(at_s, took_s, why))

    def close(self, state: Literal["failed", "cancelled", "routed"], error: MeshmaxError | None = None) -> None:
        """It is over, or the router has it now."""
        self.state, self._ended_s = state, self._now()
        if error is not None:
            self._code, self._message = error.code, plain_line(error.message)

    @property
    def has_waited(self) -> bool:
        """Whether there is something to tell of it once it is routed."""
        return bool(self._waits)

    def route(self) -> Route:
        """As of now, where the router does not have it."""
        early = self._early
        return Route(
            early.request_id,
            Sha256(""),
            PeerId(""),
            f"nobody was asked: {self._code}" if self._code else "nobody was asked yet",
            waits=tuple(self._waits),
            model=early.model[:MAX_MODEL],
            policy=early.policy,
            state="running" if self.state == "routed" else self.state,
            started_at_s=self._started_at_s,
            total_s=None if self._ended_s is None else self._ended_s - self._began_s,
            kind=early.kind,
            error=self._code,
            message=self._message,
        )

    def before(self, route: Route) -> Route:
        """``route`` is the router's of this prompt: as its client saw it."""
        by_s = (self._ended_s or self._began_s) - self._began_s
        return msgspec.structs.replace(later(route, by_s, waits=tuple(self._waits)), started_at_s=self._started_at_s)


class EarlyRecords:
    """The last of them. ``unix_now``, ``now``: seconds."""

    def __init__(self, unix_now: Callable[[], float], now: Callable[[], float]) -> None:
        self._unix_now, self._now = unix_now, now
        self._records: OrderedDict[str, EarlyRecord] = OrderedDict()

    def on_known(self, request_id: str) -> None:
        """A prompt whose model is known at once. Cheap."""
        if self._records:
            self._records.pop(request_id, None)

    @contextmanager
    def begun(self, early: Early) -> Iterator[EarlyRecord]:
        """The record of a prompt that is not known at once; the router may have it when the block ends without an error."""
        record = self._add(early)
        state: Literal["failed", "cancelled", "routed"] = "cancelled"
        refused: MeshmaxError | None = None
        try:
            yield record
            state = "routed"
        except MeshmaxError as error:
            if not record.client_left:
                state, refused = "failed", error
            raise
        finally:
            record.close(state, refused)
            if state == "routed" and not record.has_waited and self._records.get(early.request_id) is record:
                del self._records[early.request_id]

    def refused(self, early: Early, error: MeshmaxError) -> None:
        """The router does not get it."""
        record = self._records.get(early.request_id)
        if record is None or record.state != "routed":
            record = self._add(early)
        record.close("failed", error)

    def _add(self, early: Early) -> EarlyRecord:
        record = EarlyRecord(early, self._unix_now(), self._now)
        self._records.pop(early.request_id, None)
        self._records[early.request_id] = record
        if len(self._records) > EARLY_KEPT:
            self._records.popitem(last=False)
        return record

    def find(self, request_id: str) -> Route | None:
        """The newest with this id, unless the router has it."""
        record = self._records.get(request_id)
        return record.route() if record and record.state != "routed" else None

    def told(self, route: Route) -> Route:
        """``route``, the router's, from the first moment on."""
        record = self._records.get(route.request_id)
        return record.before(route) if record and record.state == "routed" else route

    def routes(self, routed: tuple[Route, ...]) -> tuple[Route, ...]:
        """``routed``, the router's, from the first moment on, and those that it did not get; newest first."""
        if not self._records:
            return routed
        early = [record.route() for record in self._records.values() if record.state != "routed"]
        return tuple(sorted((*map(self.told, routed), *early), key=lambda route: -route.started_at_s))
