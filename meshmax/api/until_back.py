"""Requests that wait for a peer that is not there yet, or was lost a moment ago.

Rules. The wait ends as well when its client leaves, when the node ends, or when its time is over. Where too many wait already,
one more is told at once what it would be told in the end. Not here: the news of peers that wakes them (services.peer_news), what
is waited for, and for how long (api.prompts).
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from starlette.types import Receive

from meshmax.api.exchange import OpenAnswers, cancel_on_hang_up
from meshmax.api.replies import ShuttingDown
from meshmax.services.peer_news import PeerNews


class UntilBack:
    """``watch`` is given what to call whenever a peer comes, goes or says something new."""

    def __init__(self, watch: Callable[[Callable[[], None]], None], open_answers: OpenAnswers) -> None:
        self._news = PeerNews(watch)
        self._open_answers = open_answers

    @property
    def is_full(self) -> bool:
        """Whether one more would not be kept: who asks again and again then would only spin."""
        return self._news.is_full

    async def wait(self, over: Callable[[], bool], receive: Receive | None, most_s: float) -> bool:
        """Until ``over()``, ``most_s`` seconds at most; no longer than its client stays. Raises ShuttingDown.

        ``receive``: the client's, who has sent all of its request; None: its leaving is not looked for. False: it has gone.
        """
        if self.is_full:
            await trio.lowlevel.checkpoint()
            return True
        stays = False
        with self._news.waiting(), self._open_answers.held() as held, trio.move_on_after(most_s) as patience:
            async with trio.open_nursery() as nursery:
                if receive is not None:
                    nursery.start_soon(cancel_on_hang_up, receive, nursery.cancel_scope)
                while not over():
                    await self._news.wait()
                stays = True
                nursery.cancel_scope.cancel()
        if held.cancelled_caught:
            raise ShuttingDown
        return stays or patience.cancelled_caught
