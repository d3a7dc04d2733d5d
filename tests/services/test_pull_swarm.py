"""Several peers that pull one model at once from one peer with a slow uplink, in virtual time."""

from __future__ import annotations

import trio
import trio.testing

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES
from meshmax.services.blob_server import BlobServer
from tests.services.pull_site import SitePeer, model_bytes, open_site

CHUNKS = 40
CHUNK_S = 0.1
PULLERS = 4


class SlowUplink:
    """A throttle of 10 MiB/s that counts what it let through."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self._free_s = 0.0

    def piece(self, direction: str) -> int:
        return CHUNK_BYTES

    def reserve(self, peer: PeerId, direction: str, size: int) -> float:
        self.sent_bytes += size
        start_s = max(trio.current_time(), self._free_s)
        self._free_s = start_s + size / CHUNK_BYTES * CHUNK_S
        return start_s - trio.current_time()


async def test_peers_that_pull_at_once_need_little_more_than_one_copy_of_a_slow_seed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        seed = await site.peer()
        uplink = SlowUplink()
        BlobServer(seed.store.blobs, throttle=uplink).register(seed.swarm)
        await seed.hold(model_bytes(CHUNKS))
        pullers = [await site.peer() for _ in range(PULLERS)]
        took_s: list[float] = []
        wasted: list[int] = []
        began_s = trio.current_time()

        async def pull(peer: SitePeer) -> None:
            last = (await peer.pull())[-1]
            assert last.state == "done"
            took_s.append(trio.current_time() - began_s)
            wasted.append(last.bytes_wasted)

        async with trio.open_nursery() as nursery:
            for peer in pullers:
                nursery.start_soon(pull, peer)
        assert uplink.sent_bytes < 1.15 * CHUNKS * CHUNK_BYTES
        assert max(took_s) < 1.25 * CHUNKS * CHUNK_S
        assert max(wasted) <= 3 * CHUNK_BYTES
