"""The first moments of a node in its mesh, in which it has not met the others yet: whoever misses something waits for them.

Where too many wait already, one more finds what there is. Owns no tasks. Not here: news of peers (services.peer_news), for how
long (core.first_moments), who is there (services.presence).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from meshmax.base.discovery import RungReport
from meshmax.core.first_moments import first_left_s
from meshmax.services.peer_news import PeerNews


class FirstMoments:
    """They begin when this is made, and with `begin`.

    ``watch`` is given what to call whenever a peer comes, goes or says something new.
    """

    def __init__(self, rungs: Callable[[], Iterable[RungReport]], watch: Callable[[Callable[[], None]], None]) -> None:
        """``rungs``: how discovery stands."""
        self._rungs = rungs
        self._began_s = trio.current_time()
        self._news = PeerNews(watch)

    def begin(self) -> None:
        """The node is up, or of another mesh: whoever is there is yet to be met."""
        self._began_s = trio.current_time()

    def left_s(self) -> float:
        """The seconds to wait for others before this is asked again; 0.0: they are over, or there is nobody to be met."""
        return first_left_s(self._began_s, self._rungs(), trio.current_time())

    async def wait(self, found: Callable[[], bool]) -> None:
        """Until ``found()``, or the first moments are over. Cancelling costs nothing."""
        await trio.lowlevel.checkpoint()
        if self._news.is_full:
            return
        with self._news.waiting():
            while not found() and (left_s := self.left_s()):
                with trio.move_on_after(left_s):
                    await self._news.wait()
