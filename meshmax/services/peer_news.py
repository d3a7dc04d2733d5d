"""News of peers, for requests that wait for them: whoever waits looks again with each, and never in between.

Rules. MAX_WAITING wait at most at one of these; who comes then is to be told at once what there is. Owns no tasks. Not here: what
is waited for, and for how long (services.first_moments, api.until_back).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

MAX_WAITING: Final = 256  # each may hold a prompt, and looks at who is there with each news


class PeerNews:
    """``watch`` is given what to call whenever a peer comes, goes or says something new."""

    def __init__(self, watch: Callable[[Callable[[], None]], None]) -> None:
        self._news = trio.Event()
        self._waiting = 0
        watch(self._on_news)

    def _on_news(self) -> None:
        if self._waiting:
            self._news.set()
            self._news = trio.Event()

    @property
    def is_full(self) -> bool:
        """Whether no more may wait."""
        return self._waiting >= MAX_WAITING

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block one more waits; see `is_full` before."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def wait(self) -> None:
        """Until the next, within `waiting`. Cancelling costs nothing."""
        await self._news.wait()
