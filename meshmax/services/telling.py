"""Tells connected members of news: all at the same time, each of one thing after the other; a slow or dead one holds up nobody.

What does not fit is made good when the member is admitted next. Not here: what is told (services.membership), what is heard
(services.admission).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from meshmax.base.ids import PeerId
from meshmax.ports import Swarm
from meshmax.services import admission
from meshmax.services.frames import FrameStream
from meshmax.telemetry.isolate import isolate
from meshmax.wire.protocols import MEMBER

TOLD_AT_ONCE: Final = 16  # members told of news at the same time
TELL_TIMEOUT_S: Final = 10.0
MAX_UNTOLD: Final = 64  # waiting for one member

Tell = Callable[[FrameStream], Awaitable[None]]


class Telling:
    """See the module. Its tasks run in ``nursery``, which its owner opened."""

    def __init__(self, swarm: Swarm, nursery: trio.Nursery) -> None:
        self._swarm, self._nursery = swarm, nursery
        self._teller = trio.CapacityLimiter(TOLD_AT_ONCE)
        self._untold: dict[PeerId, deque[Tell]] = {}  # by member that is being told something

    def tell_all(self, tell: Tell, bearer: PeerId | None = None) -> None:
        """Have ``tell`` speak to every connected member but ``bearer``. Returns at once."""
        for peer_id in self._swarm.connections():
            untold = self._untold.get(peer_id)
            if peer_id == bearer or (untold is not None and len(untold) >= MAX_UNTOLD):
                continue
            if untold is not None:
                untold.append(tell)
            else:
                self._untold[peer_id] = deque([tell])
                self._nursery.start_soon(self._tell_peer, peer_id)

    async def _tell_peer(self, peer_id: PeerId) -> None:
        untold = self._untold[peer_id]
        try:
            while untold:
                async with self._teller:
                    if not await isolate("telling members", partial(self._tell, peer_id, untold.popleft())):
                        return
        finally:
            del self._untold[peer_id]

    async def _tell(self, peer_id: PeerId, tell: Tell) -> None:
        with trio.move_on_after(TELL_TIMEOUT_S):
            stream = await self._swarm.open_stream(peer_id, MEMBER)
            try:
                frames = FrameStream(stream)
                await tell(frames)
                await admission.receive(frames)
            finally:
                with trio.CancelScope(shield=True):
                    await stream.aclose()
