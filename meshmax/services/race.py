"""Several ways to one end, tried side by side, each a while after the one before: the first that succeeds ends the others.

Rules. A way begins when its time has come, or when nothing else is under way any more; others may be added while one is under
way. That the peer takes us for no member is its answer whatever way it came, and ends the race. What failed is told in the order
in which it did. Not here: which ways there are and when (core.dial_plan); addresses that are dialled (net.dialler).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from meshmax.base.errors import ConnectError, MeshmaxError, NotAMember

MAX_ATTEMPTS: Final = 24  # told of one failure: every address, and each relay
SETTLE_S: Final = 0.2  # after somebody else has won, for the winner among us to come to its own end

Attempt = tuple[str, str, str]  # address, stage, cause


@dataclass(frozen=True)
class Way:
    """``delay_s`` after the beginning ``run`` is tried, which raises MeshmaxError if it leads nowhere."""

    name: str
    run: Callable[[], Awaitable[object]]
    delay_s: float = 0.0


class Race:
    """One race; `run` once."""

    def __init__(self) -> None:
        self._won = False
        self._refused: NotAMember | None = None
        self._attempts: list[Attempt] = []
        self._under_way = self._running = 0  # ways that may succeed; tasks that have not ended
        self._idle = trio.Event()
        self._scope = trio.CancelScope()
        self._tries: trio.Nursery | None = None

    async def run(self, ways: Sequence[Way], arrived: trio.Event | None = None) -> None:
        """Returns when one has succeeded or ``arrived`` is set. Raises NotAMember, ConnectError with every attempt."""
        began = trio.current_time()
        with self._scope:
            async with trio.open_nursery() as nursery:
                if arrived is not None:
                    nursery.start_soon(self._wait_arrived, arrived)
                async with trio.open_nursery() as self._tries:
                    for way in sorted(ways, key=lambda each: each.delay_s):
                        if self._under_way:
                            with trio.move_on_at(began + way.delay_s):
                                await self._idle.wait()
                        self._idle = trio.Event()
                        self._start(way, self._tries)
                nursery.cancel_scope.cancel()
        if self._won or (arrived is not None and arrived.is_set()):
            return
        if self._refused is not None:
            raise self._refused
        raise ConnectError(None, self._attempts[:MAX_ATTEMPTS])

    def add(self, way: Way) -> None:
        """One more way, its delay from now on; nothing happens where none is under way. Cheap, never raises."""
        if self._tries is not None and self._running:
            self._start(way, self._tries, way.delay_s)

    def _start(self, way: Way, tries: trio.Nursery, delay_s: float = 0.0) -> None:
        self._under_way += 1
        self._running += 1
        tries.start_soon(self._try, way, delay_s)

    async def _try(self, way: Way, delay_s: float) -> None:
        try:
            if delay_s:
                await trio.sleep(delay_s)
            await way.run()
        except NotAMember as error:
            self._refused = error
            self._scope.cancel()
        except MeshmaxError as error:
            found = getattr(error, "attempts", ())
            self._attempts += found or [(way.name[:200], "connect", error.message[:200])]
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        else:
            self._won = True
            self._scope.cancel()
        finally:
            self._running -= 1

    async def _wait_arrived(self, arrived: trio.Event) -> None:
        await arrived.wait()
        await trio.sleep(SETTLE_S)
        self._scope.cancel()
