"""One request under way: does what core.delivery decides, each attempt in a task of its own, and hands the client one stream.

Rules: events wait in one bounded place for a slow client, which holds the peer up; they pass without a task's switch where
the client is behind. Where nobody can be asked the request waits, and looks again when it is woken (services.waiting). Leaving
the block ends every attempt, and with it the work wherever it is done. The block's own
exception comes out as it is, not in a group. Not here: one attempt (services.trial), candidates (services.router).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Final

import msgspec
import trio

from meshmax.base.errors import MeshmaxError, raise_only, without_frames
from meshmax.base.inference import Delta, Event, RoutedEvent, Vector
from meshmax.core.delivery import Delivery
from meshmax.core.delivery_words import Action, Cancel, Done, Fail, Give, Start, Suspect
from meshmax.services.infer_client import Step
from meshmax.services.trial import Trial
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import ATTEMPTS, SUSPECTED

MAX_READY: Final = 256  # events that wait for the client; a frame of a peer more at most
MAX_READY_BYTES: Final = 1 << 20  # of them, about; the same
LOOK_S: Final = 0.5  # a deadline that moved forward is seen by then, at the latest
CLOSE_S: Final = 1.0  # after the end, for the attempt to close its books

Waits = Callable[["RequestDelivery", bool], None]

_log = get_logger("delivery")
_attempts: Final = cache(ATTEMPTS.labels)
_encode: Final = msgspec.json.Encoder().encode


class RequestDelivery:
    """The events of one request as the client gets them; made by `open_delivery`."""

    def __init__(
        self, core: Delivery, trial_for: Callable[[Start], Trial], nursery: trio.Nursery, waits: Waits
    ) -> None:
        self._core, self._trial_for, self._nursery, self._waits = core, trial_for, nursery, waits
        self._waiting = self._woken = False
        self._running: dict[int, tuple[trio.CancelScope, Trial]] = {}
        self._ready: deque[RoutedEvent] = deque()
        self._ready_bytes = 0
        self._news = trio.Event()
        self._room = trio.Event()
        self._idle = trio.Event()  # no attempt runs any more
        self._retimed = trio.Event()
        self._timer_at = math.inf
        self._error: MeshmaxError | None = None

    async def wait_first(self) -> None:
        """Until the first event is there. Raises what nobody could make good before it."""
        while not self._ready and self._error is None:
            await self._wait_news()
        if self._error is not None and not self._ready:
            raise _anew(self._error)

    def __aiter__(self) -> RequestDelivery:
        return self

    async def __anext__(self) -> RoutedEvent:
        """The next event, a Finish at the end. Raises what nobody could make good."""
        while not self._ready:
            if self._error is not None:
                raise _anew(self._error)
            if self._core.over:
                if self._running:
                    with trio.move_on_after(CLOSE_S):
                        await self._wait_idle()
                raise StopAsyncIteration
            await self._wait_news()
        event = self._ready.popleft()
        self._ready_bytes -= _size(event)
        if self._has_room:
            self._room.set()
        return event

    async def _wait_news(self) -> None:
        self._news = trio.Event()
        await self._news.wait()

    async def _wait_idle(self) -> None:
        while self._running:
            await self._idle.wait()

    def begin(self) -> None:
        """Ask the first peer."""
        self.do(self._core.begin(trio.current_time()))

    async def run_clock(self) -> None:
        """Tell the core of time, until cancelled."""
        while True:
            self._retimed = trio.Event()
            self._timer_at = self._core.deadline()
            if not self._woken:
                with trio.move_on_at(self._timer_at):
                    await self._retimed.wait()
            now = trio.current_time()
            if self._woken:
                self._woken = False
                self.do(self._core.on_news(now))
            if now >= self._core.deadline():
                self.do(self._core.tick(now))

    def do(self, actions: Sequence[Action], look_s: float = 0.0) -> None:
        """Do what the core wants. ``look_s``: how late its next deadline may be told."""
        for action in actions:
            if isinstance(action, Give):
                self._ready.extend(action.events)
                self._ready_bytes += sum(map(_size, action.events))
                self._news.set()
            elif isinstance(action, Start):
                self._start(action)
            elif isinstance(action, Cancel):
                self._cancel(action)
            elif isinstance(action, Suspect):
                SUSPECTED.labels(sign="frozen" if action.frozen else "hanging").inc()
                _log.info("peer suspected", attempt=action.attempt, frozen=action.frozen)
            elif isinstance(action, Done):
                self._news.set()
            elif isinstance(action, Fail):
                self._error = action.error
                self._news.set()
        if self._waiting is not self._core.waits:
            self._waiting = self._core.waits
            self._waits(self, self._waiting)
        self.retime(look_s)

    def wake(self) -> None:
        """Who may be asked is not what it was."""
        self._woken = True
        self._retimed.set()

    def close(self) -> None:
        """The request is over."""
        if self._waiting:
            self._waiting = False
            self._waits(self, False)

    def retime(self, unless_s: float) -> None:
        """See to it that the core hears of its next deadline, if the clock would tell it more than ``unless_s`` from now."""
        if self._timer_at > trio.current_time() + unless_s and self._core.deadline() < self._timer_at:
            self._retimed.set()

    def _start(self, action: Start) -> None:
        _attempts(kind=action.kind).inc()
        # Known at once, since it may be cancelled before its task has begun.
        scope, trial = trio.CancelScope(), self._trial_for(action)
        self._running[action.attempt] = (scope, trial)
        self._nursery.start_soon(self._run, action.attempt, scope, trial)

    def _cancel(self, action: Cancel) -> None:
        if found := self._running.get(action.attempt):
            scope, trial = found
            trial.blame = action.why
            scope.cancel()

    async def _run(self, attempt: int, scope: trio.CancelScope, trial: Trial) -> None:
        error: MeshmaxError | None = None
        with scope:
            try:
                await trial.run(_Feed(self, self._core, attempt))
            except MeshmaxError as failure:
                error = failure
        del self._running[attempt]
        self._idle.set()
        self._idle = trio.Event()
        if error is not None:
            self.do(self._core.on_failed(attempt, without_frames(error), trio.current_time()))

    @property
    def full(self) -> bool:
        """Whether as much waits for the client as may."""
        return len(self._ready) >= MAX_READY or self._ready_bytes >= MAX_READY_BYTES

    @property
    def _has_room(self) -> bool:
        return len(self._ready) <= MAX_READY // 2 and self._ready_bytes <= MAX_READY_BYTES // 2

    async def wait_room(self) -> None:
        """Wait until the client has taken some."""
        while not self._has_room:
            if self._room.is_set():  # else somebody waits for it: another attempt, that was cancelled or will be
                self._room = trio.Event()
            await self._room.wait()


def _anew(error: MeshmaxError) -> MeshmaxError:
    """``error`` to be raised: the one that is kept would know the frames that it goes through, and they know who keeps it."""
    made = type(error).__new__(type(error), *error.args)
    made.__dict__.update(error.__dict__)
    return made


def _size(event: RoutedEvent) -> int:
    """Bytes of an event, about."""
    if isinstance(event, Delta):
        size = len(event.text) + len(event.thinking)
        if event.logprobs or event.tool_calls:
            size += len(_encode((event.logprobs, event.tool_calls)))
        return size
    return len(event.values) if isinstance(event, Vector) else 0


class _Feed:
    """What one attempt brings; satisfies services.trial.Feed."""

    def __init__(self, delivery: RequestDelivery, core: Delivery, attempt: int) -> None:
        self._delivery, self._core, self._attempt = delivery, core, attempt

    def on_step(self, step: Step) -> None:
        """See Feed."""
        now = trio.current_time()
        if step == "sending":
            self._core.on_sending(self._attempt)
        elif step == "accepted":
            self._core.on_accepted(self._attempt, now)
        else:
            self._core.on_heard(self._attempt, now)
        self._delivery.retime(LOOK_S)

    async def send(self, events: Sequence[Event]) -> float:
        """See Feed."""
        began = trio.current_time()
        self._delivery.do(self._core.on_events(self._attempt, events, began), LOOK_S)
        if not self._delivery.full:
            return 0.0
        self._core.on_held(self._attempt)
        await self._delivery.wait_room()
        now = trio.current_time()
        self._core.on_resumed(self._attempt, now)
        self._delivery.retime(LOOK_S)
        return now - began


@asynccontextmanager
async def open_delivery(
    core: Delivery, trial_for: Callable[[Start], Trial], waits: Waits
) -> AsyncIterator[RequestDelivery]:
    """The request under way, begun; leaving the block ends it. ``waits`` is told when it begins to wait, and when it ends."""
    failed: MeshmaxError | None = None
    try:
        async with trio.open_nursery() as nursery:
            delivery = RequestDelivery(core, trial_for, nursery, waits)
            try:
                nursery.start_soon(delivery.run_clock)
                delivery.begin()
                yield delivery
            except MeshmaxError as error:  # out of the nursery it would be in one ring with what that cancels
                failed = error
            finally:
                delivery.close()
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        raise_only(group)  # the block's own, with its own traceback
    finally:
        del failed
