"""What this node tells of the waits for its models: shows core.slot_wait what its answers do.

The answers' events are looked at as they pass, so that nothing waits for it. Waits change with every prompt that begins or ends,
and that is when load is told (services.own_status, which bounds how often). Not here: who waits (core.residency).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from meshmax.base.inference import Ask, Delta, EmbedRequest, Event, Finish, InferRequest
from meshmax.base.status import MAX_WAITS, Wait
from meshmax.core.residency import ResidentView
from meshmax.core.slot_wait import SlotWaits

RECKONED_S: Final = 0.25  # load is looked at with every piece of an answer, and told no more often than that


class SlotWords:
    """Owned by the residency."""

    def __init__(self, residents: Callable[[], Iterable[ResidentView]]) -> None:
        self._residents = residents
        self._waits = SlotWaits()
        self._numbers = itertools.count()
        self._told: tuple[Wait, ...] = ()
        self._told_s = -math.inf

    def changed(self) -> None:
        """Something began to wait, began, or ended."""
        self._told_s = -math.inf

    @contextmanager
    def watched(self, ask: Ask) -> Iterator[Callable[[Event], None]]:
        """An answer that holds a slot within the block: call what it gives with each event."""
        number, said, whole = next(self._numbers), 0, False

        def on_event(event: Event) -> None:
            nonlocal said, whole
            if isinstance(event, Delta):
                said += event.tokens
                self._waits.on_said(number, said, trio.current_time())
            elif isinstance(event, Finish):
                whole = event.done_reason != "length"

        self._waits.on_start(number, ask.digest, trio.current_time(), limit_of(ask.request))
        try:
            yield on_event
        finally:
            self._waits.on_end(number, trio.current_time(), whole=whole)

    def told(self) -> tuple[Wait, ...]:
        """The waits for the models that take asks now, longest first, MAX_WAITS of them; reckoned anew after RECKONED_S."""
        now = trio.current_time()
        if now - self._told_s >= RECKONED_S:
            waits = [self._wait(each, now) for each in self._residents() if each.usable]
            waits.sort(key=lambda wait: (-wait.wait_s, wait.digest))
            self._told, self._told_s = tuple(waits[:MAX_WAITS]), now
        return self._told

    def _wait(self, resident: ResidentView, now: float) -> Wait:
        digest = resident.digest
        if resident.free:
            return Wait(digest, free=resident.free)
        wait_s = self._waits.wait_s(self._waits.running(digest), resident.ahead, now, digest)
        return Wait(digest, round(wait_s, 3), 0, resident.ahead)


def limit_of(request: InferRequest) -> int | None:
    """Tokens that its answer has at most from now on; None where it sets no limit."""
    limit = request.options.num_predict
    if isinstance(request, EmbedRequest) or limit is None or limit < 0:
        return None
    return max(limit - (request.said.tokens if request.said else 0), 0)
