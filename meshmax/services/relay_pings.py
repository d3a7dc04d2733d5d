"""Pings the relays that we use, so that one that is gone or frozen is noticed; libp2p by itself never notices the latter.

A relay is pinged every PING_S, and at once where there is reason to think that connections are dead, then with less patience.
One that does not speak the protocol is taken for alive. Not here: what follows from silence (services.relay_client).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.ports import Stream, Swarm
from meshmax.wire.protocols import PING

PING_S: Final = 3.0  # between pings of a relay in use; libp2p's answerers wait for at most ten seconds
PING_TIMEOUT_S: Final = 4.0  # the connection carries circuits, and waits at their rates
DOUBT_TIMEOUT_S: Final = 1.5  # the same where there is reason to think that the connection is dead
PING_BYTES: Final = 32  # of libp2p's ping protocol


class RelayPings:
    """See the module. ``uses``: whether a relay is in use; ``on_over``: it is gone, frozen (True), or in use no more."""

    def __init__(
        self,
        swarm: Swarm,
        nursery: trio.Nursery,
        uses: Callable[[PeerId], bool],
        on_over: Callable[[PeerId, bool], Awaitable[None]],
    ) -> None:
        self._swarm, self._nursery, self._uses, self._on_over = swarm, nursery, uses, on_over
        self._pinged: set[PeerId] = set()
        self._pauses: set[trio.CancelScope] = set()  # between pings
        self._waits: set[trio.CancelScope] = set()  # for answers
        self._doubted_s = float("-inf")

    def __contains__(self, relay: object) -> bool:
        return relay in self._pinged

    def keep(self, relay: PeerId) -> None:
        """Ping the relay as long as it is used."""
        if relay not in self._pinged:
            self._pinged.add(relay)
            self._nursery.start_soon(self._ping_while_used, relay)

    def doubt(self) -> None:
        """Connections may be dead: ping all at once. Cheap, never raises."""
        self._doubted_s = trio.current_time()
        for pause in self._pauses:
            pause.cancel()
        for wait in self._waits:
            wait.deadline = min(wait.deadline, self._doubted_s + DOUBT_TIMEOUT_S)

    async def _ping_while_used(self, relay: PeerId) -> None:
        try:
            frozen = await self._ping(relay)
        finally:
            self._pinged.discard(relay)
        await self._on_over(relay, frozen)

    async def _ping(self, relay: PeerId) -> bool:
        """Until it is gone (False), is frozen (True), or is of no more use (False). It may not speak the protocol."""
        stream: Stream | None = None
        failures = 0
        try:
            while self._uses(relay):
                began_s = trio.current_time()
                doubted = began_s - self._doubted_s < DOUBT_TIMEOUT_S
                with trio.move_on_after(DOUBT_TIMEOUT_S if doubted else PING_TIMEOUT_S) as scope:
                    self._waits.add(scope)
                    try:
                        stream = stream or await self._swarm.open_stream(relay, PING)
                        await _ping_once(stream)
                        failures = 0
                    except PeerGone:
                        stream, failures = None, failures + 1
                    except MeshmaxError:
                        stream = None  # it answers, and that it does not speak this protocol
                    finally:
                        self._waits.discard(scope)
                if scope.cancelled_caught:
                    return True
                if failures > 1:
                    return False
                # What came from before a doubt says nothing of now: then it is asked at once.
                if not failures and self._doubted_s <= began_s and await self._ended(stream, PING_S):
                    stream = None
        finally:
            if stream is not None:
                with trio.CancelScope(shield=True):  # does not block
                    await stream.reset()
        return False

    async def _ended(self, stream: Stream | None, within_s: float) -> bool:
        """Whether the stream ends ``within_s``; nothing else is expected to come."""
        with trio.move_on_after(within_s) as scope, suppress(PeerGone):
            self._pauses.add(scope)
            try:
                if stream is None:
                    await trio.sleep_forever()
                else:
                    await stream.receive_some(1)
            finally:
                self._pauses.discard(scope)
        return not scope.cancelled_caught


async def _ping_once(stream: Stream) -> None:
    await stream.send_all(bytes(PING_BYTES))
    left = PING_BYTES
    while left > 0:
        data = await stream.receive_some(left)
        if not data:
            raise PeerGone("the relay ended the stream")
        left -= len(data)
