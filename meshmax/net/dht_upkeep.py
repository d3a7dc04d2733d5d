"""Upkeep of what our DHT node knows: one task, a bounded number of questions at each turn.

At each turn: candidates that are due are asked whether they can be reached; nodes that are doubted, then the node heard longest
ago, whether they are still there; records are handed to newcomers; what has expired is forgotten. Now and then: a look-up of
ourselves (often at first, when there is most to learn), and of a random id in a bucket where nothing was looked up for an hour
(Kademlia 2.3). Not here: announcing again (the provider does that).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio

from meshmax.net.dht_overlays import Overlays
from meshmax.net.dht_protocol import DhtProtocol
from meshmax.wire.dht import Contact

if TYPE_CHECKING:
    from meshmax.net.dht import KademliaDht

TURN_S: Final = 15.0
SWEEP_S: Final = 60.0  # between forgettings of what has expired
CONFIRMED_PER_TURN: Final = 8
ASKED_PER_TURN: Final = 4  # whether they are still there
HANDED_PER_TURN: Final = 24
NEWCOMERS_PER_TURN: Final = (
    4  # for whom it is looked what they should hold: 2 s of work at worst, with 16,384 keys near us
)
KEYS_AT_ONCE: Final = 64  # looked at before others have their turn: 8 ms at worst
STALE_S: Final = 900.0  # a node heard later than that is not asked whether it is there
FIRST_LOOKS_S: Final = (
    30.0,
    150.0,
    600.0,
)  # after the start: look-ups of ourselves; the second is after we were confirmed
LOOK_S: Final = 3600.0  # between later ones
LONELY_S: Final = 3600.0  # without a look-up in a bucket, before a random id there is looked up


class Upkeep:
    """``random``: spreads turns, so that nodes started together do not act together."""

    def __init__(self, dht: KademliaDht, overlays: Overlays, random: Any) -> None:
        self._dht, self._overlays, self._random = dht, overlays, random
        self._started_s = self._swept_s = trio.current_time()
        self._looked = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(TURN_S * (0.5 + self._random.random()))
            async with trio.open_nursery() as nursery:
                for protocol in (self._dht.protocol, *self._overlays.protocols):
                    self._turn(protocol, nursery)
                nursery.start_soon(self._look)

    def _turn(self, protocol: DhtProtocol, nursery: trio.Nursery) -> None:
        now_s = trio.current_time()
        for contact in protocol.confirm_due(now_s, CONFIRMED_PER_TURN):
            nursery.start_soon(protocol.call_ping, contact)
        for contact in self._to_ask(protocol, now_s):
            nursery.start_soon(protocol.call_ping, contact)
        nursery.start_soon(self._hand_over, protocol)
        if now_s - self._swept_s >= SWEEP_S and protocol is self._dht.protocol:
            self._swept_s = now_s
            for each in (protocol, *self._overlays.protocols):
                each.sweep()

    def _to_ask(self, protocol: DhtProtocol, now_s: float) -> list[Contact]:
        doubted = [node for node in map(protocol.router.get, protocol.doubted) if node is not None][:ASKED_PER_TURN]
        protocol.doubted.clear()
        stale = [node for node in protocol.router if node.failures or node.heard_s < now_s - STALE_S]
        if stale and not doubted:
            doubted = [min(stale, key=lambda node: (-node.failures, node.heard_s))]
        return [node.contact for node in doubted]

    @staticmethod
    async def _hand_over(protocol: DhtProtocol) -> None:
        for _ in range(min(NEWCOMERS_PER_TURN, len(protocol.newcomers))):
            newcomer, keys = protocol.newcomers.popleft(), protocol.storage.records.keys()
            for start in range(0, len(keys), KEYS_AT_ONCE):
                protocol.hand_over(newcomer, keys[start : start + KEYS_AT_ONCE])
                await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            for _ in range(min(HANDED_PER_TURN, len(protocol.hand_overs))):
                nursery.start_soon(protocol.call_store, *protocol.hand_overs.popleft())

    async def _look(self) -> None:
        age_s = trio.current_time() - self._started_s
        due_s = FIRST_LOOKS_S[self._looked] if self._looked < len(FIRST_LOOKS_S) else self._later_s()
        if not self._dht.contacts:
            return
        if age_s >= due_s:
            self._looked += 1
            await self._dht.look_up(self._dht.endpoint.node_id)
        elif lonely := self._dht.protocol.router.lonely(LONELY_S):
            await self._dht.look_up(self._dht.random_in(*lonely[0].range))

    def _later_s(self) -> float:
        return FIRST_LOOKS_S[-1] + LOOK_S * (self._looked - len(FIRST_LOOKS_S) + 1)
