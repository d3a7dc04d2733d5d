"""One timer for the pauses between writes of all streams: with many of them a timer for each write costs as much as the write.

Those that end within TICK_S end together, none later than was asked for. Where nobody runs it (an application without a
server) each pause has a timer of its own. Not here: how long a pause is (core.write_pace).
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

TICK_S: Final = 0.005  # a tenth of the longest pause: too short for the writes of many streams to come all at once


class Pauses:
    """`run` it in a task."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, trio.Event]] = deque()  # about in order: all pauses of a moment are as long
        self._news = trio.Event()
        self._is_run = False

    async def wait(self, pause_s: float, hurry: trio.Event) -> None:
        """Until ``hurry`` is set, by whomever; that is done here after ``pause_s``, or up to TICK_S earlier."""
        if not self._is_run:
            with trio.move_on_after(pause_s):
                await hurry.wait()
            return
        self._ends.append((trio.current_time() + pause_s, hurry))
        self._news.set()
        await hurry.wait()

    async def run(self) -> None:
        """Keep the time, until cancelled."""
        self._is_run = True
        try:
            while True:
                await self._news.wait()
                while self._ends:
                    await trio.sleep_until(self._ends[0][0])
                    self._end_until(trio.current_time() + TICK_S)
                self._news = trio.Event()
        finally:
            self._is_run = False
            self._end_until(float("inf"))

    def _end_until(self, until_s: float) -> None:
        while self._ends and self._ends[0][0] <= until_s:
            self._ends.popleft()[1].set()
