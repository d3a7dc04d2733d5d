"""Prompts that wait for a peer that was lost a moment ago, and the news of peers that wakes them.

Rules. Whoever waits looks again with each news, and never in between; the wait ends as well when its client leaves, when the
node ends, or when its time is over. MAX_WAITING wait at most: one more is told at once what it would be told in the end.
Not here: what is waited for, and for how long (api.prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio
from starlette.types import Receive

from meshmax.api.exchange import OpenAnswers, cancel_on_hang_up
from meshmax.api.replies import ShuttingDown

MAX_WAITING: Final = 256  # prompts: each holds its body, and looks at who is there with each news


class UntilBack:
    """``watch`` is given what to call whenever a peer comes, goes or says something new."""

    def __init__(self, watch: Callable[[Callable[[], None]], None], open_answers: OpenAnswers) -> None:
        self._news = trio.Event()
        self._open_answers = open_answers
        self._waiting = 0
        watch(self._on_news)

    def _on_news(self) -> None:
        if self._waiting:
            self._news.set()
            self._news = trio.Event()

    async def wait(self, over: Callable[[], bool], receive: Receive, most_s: float) -> None:
        """Until ``over()``, ``most_s`` seconds at most; no longer than its client stays. Raises ShuttingDown.

        ``receive``: the client's, who has sent all of its request.
        """
        if self._waiting >= MAX_WAITING:
            await trio.lowlevel.checkpoint()
            return
        self._waiting += 1
        try:
            with self._open_answers.held() as held, trio.move_on_after(most_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_on_hang_up, receive, nursery.cancel_scope)
                    while not over():
                        await self._news.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._waiting -= 1
        if held.cancelled_caught:
            raise ShuttingDown
