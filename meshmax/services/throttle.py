"""Keeps the limits on moving blobs: satisfies ports.Throttle, and follows schedule and command while it runs.

Rules: while a prompt waits for its first token on this node, every piece waits YIELD_S, whatever the limits: a person waits
for the one, a progress bar for the other. `reserve` is called from lane threads and from tasks, for every piece of a chunk, so
it takes one lock and no more, and none while nothing is limited. A peer's own bucket and that of all are reserved together,
the longer wait counts. What a command sets is kept over restarts by ``save``. Not here: what the limits are at an hour
(core.limits), waiting (callers).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Literal

import trio

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES
from meshmax.base.units import KIB
from meshmax.core.bucket import Bucket
from meshmax.core.limits import Override, Plan, Rates
from meshmax.telemetry.log import get_logger

REFRESH_S: Final = 5.0  # how late a window of the schedule may begin or end
YIELD_S: Final = 0.05  # 1 MiB a lane in that time: blobs go on, at a tenth of their speed
MAX_YIELD_S: Final = 5.0  # a prompt that waits for longer waits for something else than the processor or the wire
PIECE_S: Final = 0.05  # of the lowest limit in one piece: half a percent of the ten seconds over which it is to be held
MIN_PIECE_BYTES: Final = 4 * KIB  # a packet or three
MAX_BUCKETS: Final = 1024  # peers with a limit of their own; the one used longest ago is forgotten, with what it owes

Direction = Literal["in", "out"]
LocalTime = Callable[[], tuple[int, int]]  # weekday (0 Monday), minutes after midnight
_log = get_logger("limits")


class RateThrottle:
    """Made by `open_throttle`."""

    def __init__(self, plan: Plan, override: Override, clock: Callable[[], float], local_time: LocalTime) -> None:
        self._plan, self._clock, self._local_time = plan, clock, local_time
        self.override = override
        self.rates = Rates()
        self._lock = threading.Lock()
        self._all: dict[Direction, Bucket] = {"out": Bucket(), "in": Bucket()}
        self._prompts: dict[object, float] = {}  # those that wait for their first token -> since when
        self._peers: OrderedDict[tuple[PeerId, Direction], Bucket] = OrderedDict()
        self.refresh()

    def limited(self, direction: Direction) -> bool:
        """Whether any limit holds."""
        rates = self.rates
        return bool(rates.up or rates.peer_up) if direction == "out" else bool(rates.down or rates.peer_down)

    def reserve(self, peer: PeerId, direction: Direction, size: int) -> float:
        """See ports.Throttle."""
        yield_s = YIELD_S if self._prompts and self._yields() else 0.0
        if not self.limited(direction):
            return yield_s
        with self._lock:
            now = self._clock()
            wait_s = self._all[direction].reserve(size, now)
            return max(yield_s, wait_s, self._bucket(peer, direction).reserve(size, now))

    def piece(self, direction: Direction) -> int:
        """See ports.Throttle: 4 KiB to a chunk, which it is while nothing is limited."""
        rates = self.rates
        limits = (rates.up, rates.peer_up) if direction == "out" else (rates.down, rates.peer_down)
        lowest = min((limit for limit in limits if limit), default=0)
        return min(max(int(lowest * PIECE_S), MIN_PIECE_BYTES), CHUNK_BYTES) if lowest else CHUNK_BYTES

    @contextmanager
    def precedence(self) -> Iterator[None]:
        """While inside, a prompt waits for its first token here: blobs move slowly meanwhile, for MAX_YIELD_S at most."""
        key = object()
        self._prompts[key] = self._clock()
        try:
            yield
        finally:
            del self._prompts[key]

    def _yields(self) -> bool:
        youngest_s = max(tuple(self._prompts.values()), default=-MAX_YIELD_S)
        return self._clock() - youngest_s < MAX_YIELD_S

    def refresh(self) -> None:
        """Let the limits of this hour hold."""
        rates = self._plan.at(*self._local_time(), self.override)
        if rates == self.rates:
            return
        _log.info("limits", up=rates.up, down=rates.down, peer_up=rates.peer_up, peer_down=rates.peer_down)
        with self._lock:
            self.rates = rates
            now = self._clock()
            self._all["out"].set_rate(rates.up, now)
            self._all["in"].set_rate(rates.down, now)
            for (_, direction), bucket in self._peers.items():
                bucket.set_rate(rates.peer_up if direction == "out" else rates.peer_down, now)

    def _bucket(self, peer: PeerId, direction: Direction) -> Bucket:
        bucket = self._peers.get((peer, direction))
        if bucket is None:
            while len(self._peers) >= MAX_BUCKETS:
                self._peers.popitem(last=False)
            rate = self.rates.peer_up if direction == "out" else self.rates.peer_down
            bucket = self._peers[peer, direction] = Bucket(rate)
        self._peers.move_to_end((peer, direction))
        return bucket


class Limits:
    """The throttle, and what a command may do with it."""

    def __init__(self, throttle: RateThrottle, save: Callable[[Override], Awaitable[None]]) -> None:
        self.throttle = throttle
        self._save = save

    @property
    def rates(self) -> Rates:
        """The limits that hold now."""
        return self.throttle.rates

    @property
    def override(self) -> Override:
        """What was set by command."""
        return self.throttle.override

    async def set(self, override: Override) -> None:
        """Let ``override`` hold from now on, over restarts too. Raises StoreFull, StoreError; it holds all the same."""
        self.throttle.override = override
        self.throttle.refresh()
        await self._save(override)


@asynccontextmanager
async def open_throttle(
    plan: Plan,
    override: Override,
    save: Callable[[Override], Awaitable[None]],
    clock: Callable[[], float],
    local_time: LocalTime,
) -> AsyncIterator[Limits]:
    """Limits that follow their schedule until the block is left. ``clock`` is read in any thread."""
    throttle = RateThrottle(plan, override, clock, local_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_refresh, throttle)
        yield Limits(throttle, save)
        nursery.cancel_scope.cancel()


async def _run_refresh(throttle: RateThrottle) -> None:
    while True:
        await trio.sleep(REFRESH_S)
        throttle.refresh()
