"""How a transfer is seen: its current value, and those who watch it.

Rules: a change of phase or state is told at once and to everybody; progress within a phase at most every POST_INTERVAL_S,
and a slow watcher gets the newest instead of all. Rates are over the last RATE_WINDOW_S. Not here: what the phases are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from meshmax.base.events import Transfer

POST_INTERVAL_S: Final = 0.06  # Ollama's own interval
RATE_WINDOW_S: Final = 5.0  # long enough to be steady, short enough to follow a source that left
MAX_SAMPLES: Final = 128  # of the rate; more than POST_INTERVAL_S leaves in the window
MAX_UNREAD: Final = 64  # phases that a watcher may lag behind; older ones are dropped
FINAL: Final = frozenset({"done", "failed", "cancelled"})


class Rate:
    """Bytes per second over the last RATE_WINDOW_S."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=MAX_SAMPLES)

    def note(self, total_bytes: int, now: float) -> float:
        """``total_bytes`` so far: the rate."""
        while len(self._samples) > 1 and now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        self._samples.append((now, total_bytes))
        since_s, bytes_then = self._samples[0]
        return (total_bytes - bytes_then) / (now - since_s) if now > since_s else 0.0


class Board:
    """Where a transfer's value stands for all to see."""

    def __init__(self, value: Transfer) -> None:
        self.value = value
        self._posted_s = -POST_INTERVAL_S
        self._watchers: set[_Watcher] = set()

    def due(self) -> bool:
        """Whether progress may be posted again."""
        return trio.current_time() - self._posted_s >= POST_INTERVAL_S

    def post(self, value: Transfer) -> None:
        """``value`` is how things are now."""
        self.value = value
        self._posted_s = trio.current_time()
        for watcher in self._watchers:
            watcher.tell(value)

    @contextmanager
    def watch(self) -> Iterator[AsyncIterator[Transfer]]:
        """The value as it is, then each change, until a final state was told."""
        watcher = _Watcher()
        watcher.tell(self.value)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


class _Watcher:
    """What one reader has not read yet. An iterator, not a generator: it may be left at any time without being closed."""

    def __init__(self) -> None:
        self._unread: deque[Transfer] = deque(maxlen=MAX_UNREAD)
        self._wake = trio.Event()
        self._ended = False

    def tell(self, value: Transfer) -> None:
        last = self._unread[-1] if self._unread else None
        if last is not None and (last.phase, last.state) == (value.phase, value.state):
            self._unread.pop()
        self._unread.append(value)
        self._wake.set()

    def __aiter__(self) -> AsyncIterator[Transfer]:
        return self

    async def __anext__(self) -> Transfer:
        await trio.lowlevel.checkpoint()
        if self._ended:
            raise StopAsyncIteration
        while not self._unread:
            self._wake = trio.Event()
            await self._wake.wait()
        value = self._unread.popleft()
        self._ended = value.state in FINAL
        return value
