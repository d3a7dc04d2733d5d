"""A simulated LAN for real nodes: real libp2p swarms over an in-memory cable, and a discovery that sees all of them.

Run it under `trio.testing.MockClock` with autojump. `SimNetwork.open_swarm` is net.swarm.open_swarm on a host of its own;
faults are named by PeerId. `SimDiscovery` stands for mDNS: everybody on the LAN is sighted after a short delay.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from meshmax.base.ids import PeerId
from meshmax.net import limits
from meshmax.net.swarm import LibrarySwarm, open_swarm
from meshmax.ports import Admission, Sighting
from meshmax.testing.memory_transport import MemoryTransport, MemoryWires

SIGHTING_DELAY_S = 0.1  # from opening a swarm to the others' sighting of it, as mDNS has
CONTROL_PORT = 11435


class SimNetwork:
    """One LAN. ``latency_s``: one way."""

    def __init__(self, latency_s: float = 0.001) -> None:
        self.wires = MemoryWires(latency_s)
        self._hosts: dict[PeerId, MemoryTransport] = {}
        self._present: dict[PeerId, tuple[str, ...]] = {}
        self._changed = trio.Event()

    @asynccontextmanager
    async def open_swarm(
        self, private_bytes: bytes, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AsyncIterator[LibrarySwarm]:
        """A real swarm on a host of its own, listening on its control port."""
        host = self.wires.attach()
        opened = open_swarm(
            private_bytes,
            [("0.0.0.0", CONTROL_PORT)],
            transport=host,
            admission=admission,
            max_guests=max_guests,
        )
        async with opened as swarm:
            self._hosts[swarm.peer_id] = host
            self._present[swarm.peer_id] = swarm.addresses
            self._wake()
            try:
                yield swarm
            finally:
                self._present.pop(swarm.peer_id, None)

    def discovery(self, peer_id: PeerId) -> SimDiscovery:
        """The discovery rung of the node ``peer_id``."""
        return SimDiscovery(self, peer_id)

    def partition(self, a: PeerId, b: PeerId) -> None:
        """From now on nothing passes between two peers; nobody is told."""
        self.wires.partition(self._hosts[a].ip, self._hosts[b].ip)

    def heal(self, a: PeerId, b: PeerId) -> None:
        """Take a `partition` back."""
        self.wires.heal(self._hosts[a].ip, self._hosts[b].ip)

    def freeze(self, peer: PeerId) -> None:
        """From now on nothing passes to or from ``peer``."""
        self.wires.freeze(self._hosts[peer].ip)

    def thaw(self, peer: PeerId) -> None:
        """Take a `freeze` back."""
        self.wires.thaw(self._hosts[peer].ip)

    def kill(self, peer: PeerId) -> None:
        """Break every connection of ``peer`` and refuse new ones, as when its process dies."""
        self._present.pop(peer, None)
        self.wires.kill(self._hosts[peer].ip)

    def present(self) -> dict[PeerId, tuple[str, ...]]:
        """Who listens now, and where."""
        return dict(self._present)

    async def wait_changed(self) -> None:
        """Wait until somebody new listens."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class SimDiscovery:
    """Sees every peer of a SimNetwork but itself; satisfies ports.Discovery."""

    name = "mdns"

    def __init__(self, network: SimNetwork, peer_id: PeerId) -> None:
        self._network, self._peer_id = network, peer_id

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """See ports.Discovery."""
        while True:
            await trio.sleep(SIGHTING_DELAY_S)
            for peer_id, addresses in self._network.present().items():
                if peer_id != self._peer_id:
                    await found.send(Sighting(peer_id, addresses, "mdns"))
            with trio.move_on_after(30.0):  # told again now and then, as mDNS does
                await self._network.wait_changed()
