"""The cached rung in virtual time: who is named when, at whatever moment it is to look again."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.discovery import KnownPeer
from meshmax.core.known_peers import KnownPeers
from meshmax.ports import Sighting
from meshmax.services.cached_peers import CachedPeers
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner

NOW_S = 1_700_000_000.0
HERE, THERE = "here", "there"
READ_S = 0.1  # what the reader takes for each
COUNT = 16
MOMENTS_S = [0.0, 0.05, 0.5, 1.45, 1.55, 3.0]


async def named(at_s: float, mesh_after: str) -> tuple[list[Sighting], list[Sighting]]:
    """Who is named before and after it was told, ``at_s`` from the beginning, to look again."""
    peers = [SeededSigner(seed).peer_id for seed in range(2, 2 + 2 * COUNT)]
    kept = [
        KnownPeer(peer, ("/ip4/10.0.0.1/tcp/1",), NOW_S, HERE if nth < COUNT else THERE)
        for nth, peer in enumerate(peers)
    ]
    now: Any = SimpleNamespace(mesh=HERE)
    found: tuple[list[Sighting], list[Sighting]] = ([], [])
    looked = False

    async def keep(_: object) -> None:
        await trio.lowlevel.checkpoint()

    async with MemoryNetwork().open_swarm(SeededSigner(1)) as swarm, trio.open_nursery() as nursery:
        rung = CachedPeers(KnownPeers(kept, NOW_S), swarm, lambda _: None, lambda: now.mesh, lambda: NOW_S, keep)
        send, receive = trio.open_memory_channel[Sighting](0)

        async def read() -> None:
            async for sighting in receive:
                found[looked].append(sighting)
                await trio.sleep(READ_S)

        nursery.start_soon(rung.run, send)
        nursery.start_soon(read)
        await trio.sleep(at_s)
        now.mesh, looked = mesh_after, True
        rung.look_again()
        await trio.sleep(2 * COUNT * READ_S + 1.0)
        nursery.cancel_scope.cancel()
    return found


@pytest.mark.parametrize("at_s", MOMENTS_S)
async def test_at_whatever_moment_it_is_to_look_again_all_are_named_again_at_once(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    _, after = await named(at_s, HERE)
    assert len({sighting.peer_id for sighting in after}) == COUNT


@pytest.mark.parametrize("at_s", MOMENTS_S)
async def test_at_whatever_moment_the_mesh_changes_peers_of_the_new_one_are_named_and_no_more_of_the_old_one(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    _, after = await named(at_s, THERE)
    new = {SeededSigner(seed).peer_id for seed in range(2 + COUNT, 2 + 2 * COUNT)}
    told = [sighting.peer_id for sighting in after]
    assert new <= set(told)
    assert len(set(told) - new) <= 1  # one is on its way
