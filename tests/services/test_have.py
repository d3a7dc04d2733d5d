"""services.have: what is listed of this peer and of its mesh."""

from __future__ import annotations

import trio

from meshmax.base.catalog import CatalogEntry
from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, Layer, Manifest, ModelDetails
from meshmax.services.have import ASK_TIMEOUT_S, HaveLister
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.wire.manifest import build_manifest, parse_manifest
from tests.services.pull_site import model_bytes

OWN, FAR, FROZEN = PeerId("own"), PeerId("far"), PeerId("frozen")
FAR_BLOB = Sha256("f" * 64)
MANIFEST = parse_manifest(
    build_manifest(Layer(CONFIG_MEDIA_TYPE, Sha256("e" * 64), 1), [Layer(MODEL_MEDIA_TYPE, FAR_BLOB, 5)])
)


def entry(name: str, digest: str, local: bool, *holders: PeerId) -> CatalogEntry:
    return CatalogEntry(name, Sha256(digest * 64), 1, 0.0, ModelDetails(), local, holders)


class Site:
    def __init__(self) -> None:
        self.blobs = MemoryBlobStore()
        self.whole = self.blobs.add(b"whole").sha256
        self.part = self.blobs.add_partial(model_bytes(10), {1, 8}).sha256
        self.none = self.blobs.add_partial(model_bytes(3, seed=5), set()).sha256
        self.lister = HaveLister(OWN, self.entries, self.blobs, self.list_blobs, self.ask, lambda: 5.5)

    def entries(self) -> tuple[CatalogEntry, ...]:
        return (
            entry("here:latest", "a", True, OWN),
            entry("there:latest", "b", False, FAR),
            entry("stuck:latest", "c", False, FROZEN, FAR),
            entry("parts:latest", "d", False),
        )

    async def list_blobs(self) -> tuple[list[Sha256], list[Sha256]]:
        await trio.lowlevel.checkpoint()
        return [self.whole], [self.part, self.none]

    async def ask(self, peer: PeerId, digest: Sha256) -> Manifest:
        if peer == FROZEN:
            await trio.sleep_forever()
        if digest == "c" * 64:
            raise PeerGone
        return MANIFEST


async def test_a_peer_lists_its_names_its_whole_blobs_and_the_chunks_of_partial_ones() -> None:
    site = Site()
    found = await site.lister.run(mesh=False)
    assert [model.name for model in found.models] == ["here:latest"]
    assert found.blobs == (site.whole,)
    assert [(one.digest, one.count, one.bits) for one in found.partials] == [(site.part, 10, b"\x02\x01")]
    assert (found.peer, found.listed_at_s, found.mesh) == (OWN, 5, False)


async def test_a_mesh_lists_what_others_have_whole_and_waits_for_nobody_long(autojump_clock: object) -> None:
    site = Site()
    found = await site.lister.run(mesh=True)
    assert [model.name for model in found.models] == ["here:latest", "there:latest", "stuck:latest"]
    assert found.blobs == (site.whole, "e" * 64, FAR_BLOB)
    assert trio.current_time() <= ASK_TIMEOUT_S + 1
