"""Peers and rendezvous nodes on one network in memory, at addresses that have bytes."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.core.registrations import Registrations
from meshmax.ports import Sighting
from meshmax.services.rendezvous import Rendezvous
from meshmax.services.rendezvous_server import RendezvousServer, open_rendezvous_server
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner

NODE_SEED = 1_000_000  # of the first node's identity; peers count from 1


class Point:
    """A rendezvous node."""

    def __init__(self, swarm: MemorySwarm, server: RendezvousServer) -> None:
        self.swarm, self.server = swarm, server
        self.place: tuple[PeerId, tuple[str, ...]] = (swarm.peer_id, (swarm.addresses[0].partition("/p2p/")[0],))


class Seeker:
    """A peer with the rung, and whom it was told of so far."""

    def __init__(self, swarm: MemorySwarm, signer: SeededSigner, places: dict[PeerId, tuple[str, ...]]) -> None:
        self.swarm, self.signer, self.mesh = swarm, signer, OPEN_MESH
        self.found: dict[PeerId, tuple[str, ...]] = {}
        self.sightings: list[tuple[float, Sighting]] = []
        self.scope = trio.CancelScope()
        self.read_s = 0.0  # what it takes for each sighting
        self.places = places
        self.rung = Rendezvous(
            swarm,
            signer,
            lambda: self.places,
            lambda: swarm.addresses,
            lambda: self.mesh,
            lambda: 1_700_000_000.0 + trio.current_time(),
            random.Random(str(signer.peer_id)),
        )

    def join(self, mesh: MeshId) -> None:
        """Go to another mesh, and say so."""
        self.mesh = mesh
        self.found.clear()
        self.rung.look_again()

    async def run(self) -> None:
        send, receive = trio.open_memory_channel[Sighting](0)
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.rung.run, send)
                async for sighting in receive:
                    self.found[sighting.peer_id] = sighting.addresses
                    self.sightings.append((trio.current_time(), sighting))
                    await trio.sleep(self.read_s)


class Site:
    """See the module."""

    def __init__(self, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(latency_s=0.01)
        self.stack, self._nursery = stack, nursery
        self._made = 0

    async def swarm(self, signer: SeededSigner, address: str = "") -> MemorySwarm:
        self._made += 1
        swarm = await self.stack.enter_async_context(self.network.open_swarm(signer))
        self.network.move(swarm, address or f"/ip4/10.{self._made >> 8}.{self._made & 255}.1/tcp/11435")
        return swarm

    async def point(self, number: int = 0, address: str = "", registrations: Registrations | None = None) -> Point:
        swarm = await self.swarm(SeededSigner(NODE_SEED + number), address)
        return Point(swarm, await self.stack.enter_async_context(open_rendezvous_server(swarm, registrations)))

    async def seeker(self, seed: int, *points: Point) -> Seeker:
        signer = SeededSigner(seed)
        seeker = Seeker(await self.swarm(signer), signer, dict(point.place for point in points))
        self._nursery.start_soon(seeker.run)
        return seeker


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    """A site; leaving the block ends everybody."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        # Entered before the swarms, so that these end first: peers then find nobody to say good-bye to.
        try:
            yield Site(stack, nursery)
        finally:
            nursery.cancel_scope.cancel()
