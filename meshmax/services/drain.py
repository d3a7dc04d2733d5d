"""Taking this node out of service: does what core.draining decides to the answers that run on its engines.

Whoever answers enters `admit` for as long as the answer lasts: it raises Draining instead of admitting, and ends what is
inside with Draining when the core says so; where that comes from the middle of a body, the body is cancelled. State changes are
told to ``on_change``, which must be cheap. Not here: prompts of our own API that others answer, and other peers (node.draining).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import trio

from meshmax.base.drain import DrainView
from meshmax.core.draining import Action, DrainCore, End
from meshmax.telemetry.log import get_logger

_log = get_logger("drain")


class Drain:
    """Made by `open_drain`."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._core = DrainCore()
        self._on_change = on_change
        self._scopes: dict[int, trio.CancelScope] = {}
        self._moved = trio.Event()  # something has happened; a new one each time

    @property
    def view(self) -> DrainView:
        """How we stand now."""
        return self._core.snapshot(trio.current_time())

    @contextmanager
    def admit(self) -> Iterator[Callable[[], None]]:
        """For as long as one answer lasts; call what it gives once the answer has begun. Raises Draining, at the end too."""
        number = self._core.on_ask()
        try:
            with trio.CancelScope() as scope:
                self._scopes[number] = scope
                yield lambda: self._core.on_begun(number)
        finally:
            del self._scopes[number]
            if actions := self._core.on_end(number):  # else nothing has changed that anybody waits for
                self._do(actions)
        if scope.cancelled_caught:
            raise self._core.ended()

    def drain(self, deadline_s: float, *, stopping: bool = False) -> DrainView:
        """Take nothing any more; end what still runs after ``deadline_s``. Cheap; again, it changes the deadline.

        ``stopping``: because the node ends.
        """
        self._do(self._core.on_drain(deadline_s, trio.current_time(), stopping=stopping))
        return self.view

    def undrain(self) -> DrainView:
        """Take asks again. Cheap, and no error where nothing was drained."""
        self._do(self._core.on_undrain())
        return self.view

    async def wait_drained(self) -> DrainView:
        """Until no answer runs, or the node was undrained."""
        await trio.lowlevel.checkpoint()
        while self._core.state == "draining":
            await self._moved.wait()
        return self.view

    async def run(self) -> NoReturn:
        """End answers at the deadline, until cancelled."""
        while True:
            with trio.move_on_at(self._core.deadline()):
                await self._moved.wait()
            self._do(self._core.tick(trio.current_time()))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, End):
                if scope := self._scopes.get(action.answer):
                    scope.cancel()
            else:
                _log.info("drain", state=action.state, running=self.view.running)
                self._on_change()
        moved, self._moved = self._moved, trio.Event()
        moved.set()


@asynccontextmanager
async def open_drain(on_change: Callable[[], None] = lambda: None) -> AsyncIterator[Drain]:
    """The drain of one node, which runs until the block is left."""
    async with trio.open_nursery() as nursery:
        drain = Drain(on_change)
        nursery.start_soon(drain.run)
        try:
            yield drain
        finally:
            nursery.cancel_scope.cancel()
