"""Many presences on one memory network, in virtual time."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from meshmax.base.config import Config
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.status import ModelPresence, PeerStatus
from meshmax.ports import Admission, Sighting
from meshmax.services.presence import PresenceService, open_presence
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner

STARTED_AT_S = 1_700_000_000.0


class Told:
    """A rung that was told where some peers are."""

    name = "told"

    def __init__(self, *sightings: Sighting) -> None:
        self.sightings = sightings

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        for sighting in self.sightings:
            await found.send(sighting)


class Peer:
    """One peer: its swarm and presence; `leave` ends it in order."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.signer = name, SeededSigner(seed)
        self.models: tuple[ModelPresence, ...] = ()
        self.mesh_id = OPEN_MESH
        self.swarm: MemorySwarm
        self.presence: PresenceService
        self.end, self.ended = trio.Event(), trio.Event()

    async def leave(self) -> None:
        self.end.set()
        await self.ended.wait()

    def sees(self) -> set[str]:
        """Names of the peers online."""
        return {v.status.name for v in self.presence.peers() if v.state in ("online", "draining") and v.status}

    def listed(self) -> int:
        """Lines of the list of peers, ourselves not counted."""
        return len(self.presence.peers()) - 1


class Mesh:
    """Peers on one network; ``rungs`` name whom each was told of."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.peers: list[Peer] = []
        self._nursery = nursery

    async def peer(
        self,
        *told: Peer,
        seed: int | None = None,
        admission: Admission | None = None,
        config: Config | None = None,
        mesh_id: MeshId = OPEN_MESH,
    ) -> Peer:
        number = len(self.peers)
        peer = Peer(f"peer{number}", seed or number + 1)
        peer.mesh_id = mesh_id
        self.peers.append(peer)
        started = trio.Event()
        self._nursery.start_soon(self._live, peer, number, told, admission, config or Config(), started)
        await started.wait()
        return peer

    async def _live(
        self,
        peer: Peer,
        number: int,
        told: tuple[Peer, ...],
        admission: Admission | None,
        config: Config,
        started: trio.Event,
    ) -> None:
        rung = Told(*(Sighting(other.swarm.peer_id, other.swarm.addresses, "mdns") for other in told))
        async with AsyncExitStack() as stack:
            peer.swarm = await stack.enter_async_context(self.network.open_swarm(peer.signer, admission))
            peer.presence = await stack.enter_async_context(
                open_presence(
                    peer.swarm,
                    peer.signer,
                    config,
                    lambda: PeerStatus(
                        peer.signer.peer_id, 0, 0, peer.name, "0", models=peer.models, mesh=peer.mesh_id
                    ),
                    rung,
                    lambda: STARTED_AT_S + trio.current_time(),
                    random.Random(number),
                )
            )
            started.set()
            await peer.end.wait()
        peer.ended.set()

    def cut(self, left: list[Peer], right: list[Peer], heal: bool = False) -> None:
        """Nothing passes between the two sides from now on, or everything does again."""
        change = self.network.heal if heal else self.network.partition
        for a in left:
            for b in right:
                change(a.swarm.peer_id, b.swarm.peer_id)

    def freeze(self, peer: Peer) -> None:
        self.network.freeze(peer.swarm.peer_id)


@asynccontextmanager
async def open_mesh() -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], deadline_s: float = 60.0) -> float:
    """Virtual seconds until ``condition`` holds; TooSlowError after ``deadline_s``."""
    began = trio.current_time()
    with trio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110  it looks from outside, as a person would
            await trio.sleep(0.05)
    return trio.current_time() - began
