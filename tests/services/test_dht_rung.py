"""The DHT's rung in a change of mesh: neither keys nor peers of one mesh get into the other."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.providers import ProviderRecord
from meshmax.ports import Sighting
from meshmax.services.announce import IN_MESH
from meshmax.services.dht_rung import DhtRung
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.dht import dht_key

OWN, OTHER, OLD = (SeededSigner(seed).peer_id for seed in (1, 2, 3))
MESH = MeshId(SeededSigner(9).peer_id)


class Slow:
    """A DHT that takes a second to name somebody."""

    def __init__(self, names: PeerId) -> None:
        self.names, self.asked = names, list[bytes]()
        self.contacts, self.problem = 1, ""

    async def find(self, key: bytes, enough: int = 1) -> tuple[ProviderRecord, ...]:
        self.asked.append(key)
        await trio.sleep(1)
        return (ProviderRecord(key, self.names, 1, 0, 1, ("/ip4/10.0.0.1/tcp/1",)),)


async def test_a_look_up_that_the_change_of_mesh_overtakes_names_nobody_and_asks_no_further(
    autojump_clock: trio.testing.MockClock,
) -> None:
    before, after = Slow(OLD), Slow(OTHER)
    now: Any = SimpleNamespace(dht=before, mesh=OPEN_MESH)
    swarm: Any = SimpleNamespace(peer_id=OWN, connections=dict)
    rung = DhtRung(swarm, lambda: now.dht, lambda: now.mesh, lambda: [OLD], Random(1))
    send, receive = trio.open_memory_channel[Sighting](9)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rung.run, send)
        await trio.sleep(0.5)
        now.dht = None
        await trio.sleep(1)
        assert rung.problem == "the DHT is off"
        now.dht, now.mesh = after, MESH
        rung.look_again()
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    assert before.asked == [dht_key(OPEN_MESH, IN_MESH.kind, IN_MESH.text)]
    assert after.asked[0] == dht_key(MESH, IN_MESH.kind, IN_MESH.text)
    send.close()
    assert {sighting.peer_id async for sighting in receive} == {OTHER}
