"""The DHT as a rung of discovery: peers of our mesh that announced themselves, and old neighbours that moved. Satisfies
ports.Discovery.

Rules: at first and after every change of the network it looks often, later every MAX_PAUSE_S. Old neighbours that are not
connected are looked up by their PeerId, a few a round, so that one that was away and came back elsewhere is found. All of
it is hearsay: sightings. Not here: the DHT (net.dht), our own announcements (services.announce).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import trio

from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId
from meshmax.core.announce import Word
from meshmax.core.backoff import Random
from meshmax.core.own_addresses import with_peer
from meshmax.ports import Dht, Sighting, Swarm
from meshmax.services.announce import IN_MESH
from meshmax.wire.dht import dht_key

FIRST_PAUSE_S: Final = 2.0
GROWTH: Final = 1.5  # of the pause, a round
MAX_PAUSE_S: Final = 300.0
NO_NODES_PAUSE_S: Final = 1.0  # until somebody is known whom one could ask
LOOK_UP_S: Final = 10.0
OLD_NEIGHBOURS: Final = 8  # looked up by PeerId in one round


class DhtRung:
    """``known``: peers that we were connected with before; ``dht`` None: there is none now; ``why_off``: nor shall there be."""

    name = "dht"

    def __init__(
        self,
        swarm: Swarm,
        dht: Callable[[], Dht | None],
        mesh: Callable[[], MeshId],
        known: Callable[[], Sequence[PeerId]],
        random: Random,
        why_off: Callable[[], str] = lambda: "",
    ) -> None:
        self._why_off = why_off
        self._swarm, self._dht, self._mesh, self._known, self._random = swarm, dht, mesh, known, random
        self._again = trio.Event()

    @property
    def off(self) -> str:
        """Why this rung is not climbed now; '' when it is."""
        return self._why_off()

    @property
    def problem(self) -> str:
        """Why it finds nobody at the moment; '' when it can."""
        dht = self._dht()
        if dht is None:
            return "the DHT is off"
        return dht.problem or ("" if dht.contacts else "no node of the DHT is known yet")

    def look_again(self) -> None:
        """See ports.LooksAgain."""
        self._again.set()
        self._again = trio.Event()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> NoReturn:
        """See ports.Discovery."""
        pause_s = FIRST_PAUSE_S
        while True:
            again, dht = self._again, self._dht()
            wait_s = NO_NODES_PAUSE_S
            if dht is not None and dht.contacts:
                await self._look(dht, found)
                wait_s, pause_s = pause_s * (0.75 + 0.5 * self._random.random()), min(GROWTH * pause_s, MAX_PAUSE_S)
            with trio.move_on_after(wait_s):
                await again.wait()
                pause_s = FIRST_PAUSE_S

    async def _look(self, dht: Dht, found: trio.MemorySendChannel[Sighting]) -> None:
        await self._look_up(dht, IN_MESH, found)
        lost = [peer for peer in self._known() if peer not in self._swarm.connections()]
        lost.sort(key=lambda _: self._random.random())
        for peer in lost[:OLD_NEIGHBOURS]:
            await self._look_up(dht, Word("peer", peer), found, peer)

    async def _look_up(
        self, dht: Dht, word: Word, found: trio.MemorySendChannel[Sighting], only: PeerId | None = None
    ) -> None:
        if self._dht() is not dht:
            return  # the mesh is another one: its keys are no business of this DHT
        with trio.move_on_after(LOOK_UP_S):
            for record in await dht.find(dht_key(self._mesh(), word.kind, word.text)):
                if self._dht() is not dht:
                    return  # and whom the old one knows is no peer of ours any more
                if record.peer_id == self._swarm.peer_id or not record.addresses or only not in (None, record.peer_id):
                    continue
                await found.send(Sighting(record.peer_id, with_peer(record.addresses, record.peer_id), "dht"))
