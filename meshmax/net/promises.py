"""Protocols that will be served in a moment: streams that peers open meanwhile wait for that, instead of being refused.

Who starts listens first, because its addresses go into what is opened next; a peer that knew it before is there at once, and one
that is told "I do not speak that" takes it for another program. Bounded by the protocols that were promised; a stream waits for
PROMISE_S at most, as one of those that the peer may have open. Shared by the real swarm and the one in memory. Not here: which
protocols (node.opening).
"""

from __future__ import annotations

from typing import Final

import trio

PROMISE_S: Final = 30.0  # a node with a large store on a busy machine has opened by then


class Promises:
    """Those of one swarm."""

    def __init__(self) -> None:
        self._served: dict[str, trio.Event] = {}

    def __contains__(self, protocol: str) -> bool:
        """Whether it is promised and not served yet."""
        return protocol in self._served

    def add(self, protocol: str) -> None:
        """It will be served."""
        self._served.setdefault(protocol, trio.Event())

    def keep(self, protocol: str) -> None:
        """It is served now. Cheap, and nothing where it was not promised."""
        if (served := self._served.pop(protocol, None)) is not None:
            served.set()

    def end(self) -> tuple[str, ...]:
        """Nothing more will be served; the protocols that were promised in vain."""
        left = tuple(self._served)
        for protocol in left:
            self.keep(protocol)
        return left

    async def wait(self, protocol: str) -> None:
        """Until it is served or will not be."""
        if (served := self._served.get(protocol)) is not None:
            with trio.move_on_after(PROMISE_S):
                await served.wait()
        else:
            await trio.lowlevel.checkpoint()
