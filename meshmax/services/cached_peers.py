"""The cached rung: peers that we were connected with are looked for where they were. Satisfies ports.Discovery.

They are named at the start, again every REPEAT_S, and at once after a change of the network or of our mesh; those that are
connected are left out. Whoever is connected is written down: a newcomer within NEWS_PAUSE_S, so that a machine that loses
its power soon after still knows its neighbours, renewed every RENEW_S, and at the end. A disk that takes it not costs a line in
the log. Not here: who is kept (core.known_peers), the file (store.peers_file).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.discovery import KnownPeer
from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus
from meshmax.core.known_peers import KnownPeers
from meshmax.ports import Sighting, Swarm
from meshmax.telemetry.isolate import isolate

REPEAT_S: Final = 60.0  # the table of peers forgets those that nobody names for ten minutes
NEWS_PAUSE_S: Final = 2.0  # a status with the peer's own addresses comes within a beat or two
RENEW_S: Final = 600.0
LAST_WRITE_S: Final = 2.0  # for the last write, when the node ends

Keep = Callable[[tuple[KnownPeer, ...]], Awaitable[None]]  # writes them down; raises StoreError
StatusOf = Callable[[PeerId], PeerStatus | None]


class CachedPeers:
    """See the module. ``status_of``: what a peer says of itself; ``mesh``: the id of ours now."""

    name = "cached"

    def __init__(
        self,
        known: KnownPeers,
        swarm: Swarm,
        status_of: StatusOf,
        mesh: Callable[[], str],
        unix_now: Callable[[], float],
        keep: Keep,
    ) -> None:
        self._known, self._swarm, self._status_of = known, swarm, status_of
        self._mesh, self._unix_now, self._keep = mesh, unix_now, keep
        self._again = trio.Event()
        self._news = trio.Event()
        self._dirty = False

    def look_again(self) -> None:
        """See ports.LooksAgain."""
        self._again.set()
        self._again = trio.Event()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """See ports.Discovery."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._write)
            await self._name(found)

    async def _name(self, found: trio.MemorySendChannel[Sighting]) -> NoReturn:
        while True:
            again = self._again
            for peer in self._known.to_dial(self._mesh()):
                if again.is_set():
                    break  # all begins anew, in another mesh perhaps
                if peer.peer_id not in self._swarm.connections():
                    await found.send(Sighting(peer.peer_id, peer.addresses, "cached"))
            with trio.move_on_after(REPEAT_S):
                await again.wait()

    async def _follow(self) -> None:
        async with self._swarm.subscribe() as events:
            async for event in events:
                if event.kind == "connected":
                    self._news.set()

    async def _write(self) -> NoReturn:
        try:
            while True:
                with trio.move_on_after(RENEW_S):
                    await self._news.wait()
                self._news = trio.Event()
                await trio.sleep(NEWS_PAUSE_S)
                self._note()
                await self._save()
        finally:
            self._note()
            with trio.CancelScope(deadline=trio.current_time() + LAST_WRITE_S, shield=True):
                await self._save()

    def _note(self) -> None:
        now_s = self._unix_now()
        for peer_id, connection in self._swarm.connections().items():
            status = self._status_of(peer_id)
            again = connection.direction == "out" and not connection.path.startswith("punched")  # whose port is gone
            worked = f"{connection.address}/p2p/{peer_id}" if again else ""
            self._known.on_seen(self._mesh(), peer_id, worked, status.addresses if status else (), now_s)
            self._dirty = True

    async def _save(self) -> None:
        if self._dirty and await isolate("known peers", partial(self._keep, self._known.snapshot())):
            self._dirty = False
