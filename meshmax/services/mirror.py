"""Mirroring at work: pulls what the rules want, in their hours, over a link that is there now and then.

Rules: few models at once; a pull belongs to no request, is listed among the transfers, ends with its rule's hours, keeps
what was fetched, and goes on in the next ones, since the next look finds that the model is still wanted. One that fails is
tried again after RETRY_S, one that a person cancelled not before the rule's next hours. Not here: what is wanted
(core.mirror), pulling (services.pull).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, TypeVar

import msgspec
import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.events import Transfer
from meshmax.base.ids import Sha256
from meshmax.base.model import StoredModel
from meshmax.base.names import parse_name
from meshmax.base.status import PeerView
from meshmax.core.mirror import MirrorPlan, Wanted
from meshmax.ports import Pulls
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

CHECK_INTERVAL_S: Final = 5.0  # how late a rule's hours may begin or end
MAX_AT_ONCE: Final = 2  # models; they share one link
RETRY_S: Final = 60.0  # after a pull that failed
MAX_REMEMBERED: Final = 1024  # pulls that failed or were cancelled; the oldest is forgotten first

LocalTime = Callable[[], tuple[int, int]]  # weekday (0 Monday), minutes after midnight
Key = tuple[str, Sha256]  # name and digest
V = TypeVar("V")
_log = get_logger("mirror")


class _Running(msgspec.Struct):
    wanted: Wanted
    scope: trio.CancelScope


class Mirror:
    """Follows the rules of ``plan`` with ``pulls``."""

    def __init__(
        self,
        plan: MirrorPlan,
        pulls: Pulls,
        views: Callable[[], Iterable[PeerView]],
        local: Callable[[], Iterable[StoredModel]],
        local_time: LocalTime | None = None,
    ) -> None:
        self._plan, self._pulls, self._views, self._local = plan, pulls, views, local
        self._local_time = local_time or _local_time
        self._running: dict[Key, _Running] = {}
        self._retry_at_s: dict[Key, float] = {}
        self._left_alone: dict[Key, int] = {}  # cancelled by a person -> rule

    async def run(self) -> NoReturn:
        """Until cancelled; that ends the pulls, and what was fetched is kept."""
        async with trio.open_nursery() as nursery:
            while True:
                self._look(nursery)
                await trio.sleep(CHECK_INTERVAL_S)

    def _look(self, nursery: trio.Nursery) -> None:
        weekday, minute = self._local_time()
        for key, rule in list(self._left_alone.items()):
            if not self._plan.holds(rule, weekday, minute):
                del self._left_alone[key]
        wanted = {(w.name, w.digest): w for w in self._wanted(weekday, minute)}
        newer = {w.name: w.digest for w in wanted.values()}
        for running in self._running.values():
            over = not self._plan.holds(running.wanted.rule, weekday, minute)
            if over or newer.get(running.wanted.name, running.wanted.digest) != running.wanted.digest:
                running.scope.cancel()
        for key, one in wanted.items():
            if len(self._running) >= MAX_AT_ONCE:
                break
            if self._may_begin(key):
                self._running[key] = _Running(one, trio.CancelScope())
                nursery.start_soon(self._run, key, self._running[key])

    def _wanted(self, weekday: int, minute: int) -> tuple[Wanted, ...]:
        here = {parse_name(stored.name).key: stored.manifest.digest for stored in self._local()}
        return self._plan.wanted(self._views(), here, weekday, minute)

    def _may_begin(self, key: Key) -> bool:
        waits = trio.current_time() < self._retry_at_s.get(key, 0.0)
        return key not in self._running and key not in self._left_alone and not waits

    async def _run(self, key: Key, running: _Running) -> None:
        try:
            await isolate("mirror", lambda: self._pull(key, running), model=running.wanted.name)
        finally:
            del self._running[key]

    async def _pull(self, key: Key, running: _Running) -> None:
        wanted = running.wanted
        _log.info("mirroring", model=wanted.name, digest=wanted.digest[:12], peer=wanted.peer)
        last: Transfer | None = None
        with running.scope:
            try:
                async with self._pulls.open_pull(f"{wanted.name}@{wanted.digest}") as values:
                    async for value in values:
                        last = value
            except MeshmaxError as error:
                _log.info("mirroring failed", model=wanted.name, code=error.code, error=error.message)
        if running.scope.cancelled_caught:
            _log.info("mirroring stopped: its hours are over, or there is a newer one", model=wanted.name)
        elif last is not None and last.state == "cancelled":
            _remember(self._left_alone, key, wanted.rule)
        elif last is None or last.state != "done":
            _remember(self._retry_at_s, key, trio.current_time() + RETRY_S)


def _remember(table: dict[Key, V], key: Key, value: V) -> None:
    while len(table) >= MAX_REMEMBERED:
        del table[next(iter(table))]
    table[key] = value


def _local_time() -> tuple[int, int]:
    now = time.localtime()
    return now.tm_wday, now.tm_hour * 60 + now.tm_min
