"""Trio's threads work in the network namespace of who asks for them.

Trio keeps threads for ten seconds and gives them to whoever asks next. A thread that began in a NAT lab's host would open the
sockets, and start the processes, of the next test of the same worker in there, which nobody reaches, and the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import outcome
from trio._core import _thread_cache


class FollowingCache(_thread_cache.ThreadCache):
    """Trio's threads, each of which first goes where its work was asked for. ``enter``: this thread, by a namespace's file."""

    def __init__(self, enter: Callable[[int], None]) -> None:
        super().__init__()
        self._enter = enter

    def start_thread_soon(
        self, fn: Callable[[], Any], deliver: Callable[[outcome.Outcome[Any]], object], name: str | None = None
    ) -> None:
        """See trio.lowlevel.start_thread_soon."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        def work() -> Any:
            try:
                self._enter(here)
            finally:
                os.close(here)
            return fn()

        try:
            super().start_thread_soon(work, deliver, name)
        except BaseException:
            os.close(here)
            raise


def let_threads_follow(enter: Callable[[int], None]) -> None:
    """From now on, in this process. Once is enough."""
    if not isinstance(_thread_cache.THREAD_CACHE, FollowingCache):
        _thread_cache.THREAD_CACHE = FollowingCache(enter)
