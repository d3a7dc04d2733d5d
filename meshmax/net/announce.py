"""Connected and disconnected, told to any number of subscribers, none of which can miss a change or make us wait.

Rules: "connected" and "disconnected" of a peer alternate, beginning with "connected"; between them it may have moved. A
subscriber that has not read yet keeps at most two pending events a peer, because "connected, disconnected" that nobody saw
cancel out, and who reads that a peer came looks then over which connection; so memory is bounded by the number of peers, not by
the number of changes. Not here: who is connected (the swarms).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from meshmax.base.ids import PeerId
from meshmax.net.links import Change
from meshmax.ports import SwarmEvent


class _Mailbox:
    """What one subscriber has still to read."""

    def __init__(self, connected: Iterable[PeerId]) -> None:
        self._pending: deque[SwarmEvent] = deque(SwarmEvent(peer, "connected") for peer in connected)
        self._posted = trio.Event()

    def post(self, event: SwarmEvent) -> None:
        """Add ``event``; where two of the same peer are pending already, the new one takes back the last of them."""
        of_peer = [waiting for waiting in self._pending if waiting.peer_id == event.peer_id]
        if of_peer and event.kind == "moved":
            return  # it is there: what is pending says so already
        if of_peer and of_peer[-1].kind == "moved":
            self._pending.remove(of_peer[-1])
            self._pending.append(event)
        elif len(of_peer) >= 2:
            self._pending.remove(of_peer[-1])
        else:
            self._pending.append(event)
        self._posted.set()

    async def pump(self, sink: trio.MemorySendChannel[SwarmEvent], scope: trio.CancelScope) -> None:
        """Hand events over one by one until the subscriber leaves."""
        with scope, sink:
            while True:
                while self._pending:
                    await sink.send(self._pending.popleft())
                self._posted = trio.Event()
                await self._posted.wait()


class Announcer:
    """Tells subscribers who came and who went. Its pumps run in the nursery of the swarm that owns it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._connected: dict[PeerId, None] = {}
        self._mailboxes: set[_Mailbox] = set()

    def connected(self, peer_id: PeerId) -> None:
        """The peer's first connection is there; told once until `disconnected`."""
        if peer_id not in self._connected:
            self._connected[peer_id] = None
            self._post(SwarmEvent(peer_id, "connected"))

    def moved(self, peer_id: PeerId) -> None:
        """The best connection of a connected peer is another than before."""
        if peer_id in self._connected:
            self._post(SwarmEvent(peer_id, "moved"))

    def disconnected(self, peer_id: PeerId) -> None:
        """The peer's last connection is lost; told once."""
        if peer_id in self._connected:
            del self._connected[peer_id]
            self._post(SwarmEvent(peer_id, "disconnected"))

    def tell(self, peer_id: PeerId, change: Change | None) -> None:
        """What a change of its links (net.links) means for the peer; None: nothing."""
        if change == "connected":
            self.connected(peer_id)
        elif change == "moved":
            self.moved(peer_id)
        elif change == "disconnected":
            self.disconnected(peer_id)

    def _post(self, event: SwarmEvent) -> None:
        for mailbox in self._mailboxes:
            mailbox.post(event)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[SwarmEvent]]:
        """See ports.Swarm.subscribe. The channel ends when the swarm closes."""
        mailbox = _Mailbox(self._connected)
        sink, source = trio.open_memory_channel[SwarmEvent](0)
        scope = trio.CancelScope()
        self._mailboxes.add(mailbox)
        self._nursery.start_soon(mailbox.pump, sink, scope)
        with source:
            try:
                yield source
            finally:
                self._mailboxes.discard(mailbox)
                scope.cancel()  # before the channel is closed, which would fail a pump that waits for its reader
