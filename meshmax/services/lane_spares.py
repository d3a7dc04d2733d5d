"""Lanes that are opened before they are needed, so that a blob's first chunk does not wait for them.

Rules: whoever knows that a blob will be fetched from a peer soon says so (`prepare`); the next `open_lane` to that peer takes
a lane that is open already, or on its way. A spare that nobody takes within SPARE_S is closed. One that fails is
an error of nobody but its taker. Not here: how a lane is opened and used (services.lane_client).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.ports import FetchLane, Stream
from meshmax.services.lane_client import OPEN_TIMEOUT_S, LaneOpener

SPARE_S: Final = 10.0  # a manifest, a map and a few small blobs are there by then
MAX_SPARES: Final = 8  # in all: each holds a thread and its buffers at the server
MAX_SPARES_PER_PEER: Final = 2  # beside those in use, within the lanes that a peer may have


class _Spare:
    """One lane on its way, open, or failed."""

    def __init__(self) -> None:
        self.settled = trio.Event()
        self.released = trio.Event()
        # Ends the spare if nobody takes it; set here, since it may be taken before its task has begun.
        self.unused = trio.CancelScope(deadline=trio.current_time() + SPARE_S)
        self.lane: tuple[FetchLane, Stream] | None = None
        self.error: MeshmaxError = PeerGone("no lane in time")


class LaneSpares:
    """Opens lanes like its ``opener``, some of them in advance, in tasks of ``nursery``."""

    def __init__(self, opener: LaneOpener, nursery: trio.Nursery) -> None:
        self.per_peer = opener.per_peer
        self._opener = opener
        self._nursery = nursery
        self._spares: dict[PeerId, list[_Spare]] = {}

    def prepare(self, peer: PeerId, count: int) -> None:
        """Have ``count`` lanes to ``peer`` ready soon, as far as there is room for spares."""
        spares = self._spares.get(peer, [])
        room = MAX_SPARES - sum(map(len, self._spares.values()))
        for _ in range(min(min(count, MAX_SPARES_PER_PEER) - len(spares), room)):
            spare = _Spare()
            self._spares.setdefault(peer, []).append(spare)
            self._nursery.start_soon(self._keep, peer, spare)

    @asynccontextmanager
    async def open_lane(self, peer: PeerId) -> AsyncIterator[tuple[FetchLane, Stream]]:
        """See LaneOpener; takes a spare where there is one."""
        spare = self._take(peer)
        if spare is None:
            async with self._opener.open_lane(peer) as opened:
                yield opened
            return
        try:
            await spare.settled.wait()
            if spare.lane is None:
                raise spare.error
            yield spare.lane
        finally:
            spare.released.set()

    def opened(self, peer: PeerId) -> None:
        """See LaneOpener."""
        self._opener.opened(peer)

    def failed(self, peer: PeerId, error: MeshmaxError) -> None:
        """See LaneOpener."""
        self._opener.failed(peer, error)

    def _take(self, peer: PeerId) -> _Spare | None:
        # One whose time is over is being closed, though its task may not have come to that yet.
        spare = next((each for each in self._spares.get(peer, ()) if not each.unused.cancel_called), None)
        if spare is None:
            return None
        self._drop(peer, spare)
        spare.unused.deadline = float("inf")
        return spare

    def _drop(self, peer: PeerId, spare: _Spare) -> None:
        spares = self._spares.get(peer, [])
        if spare in spares:
            spares.remove(spare)
            if not spares:
                del self._spares[peer]

    async def _keep(self, peer: PeerId, spare: _Spare) -> None:
        try:
            with spare.unused, trio.fail_after(OPEN_TIMEOUT_S) as opening:
                async with self._opener.open_lane(peer) as spare.lane:
                    opening.deadline = float("inf")
                    spare.settled.set()
                    await spare.released.wait()
        except MeshmaxError as error:
            spare.error = error
        except trio.TooSlowError:
            pass  # its error says so
        finally:
            spare.settled.set()
            self._drop(peer, spare)
