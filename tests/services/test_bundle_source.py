"""A bundle beside peers: what one lacks the other gives, in one pull."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from meshmax.base.catalog import CatalogEntry
from meshmax.base.errors import BlobNotFound, StoreCorrupt
from meshmax.base.model import CHUNK_BYTES, ModelDetails
from meshmax.base.names import parse_name
from meshmax.base.units import MIB
from meshmax.services.bundle_source import BundleSource
from meshmax.services.import_bundle import Importer, ImportWorld, Mesh
from meshmax.store.bundle_read import find_bundles
from meshmax.wire.manifest import parse_manifest
from tests.services import bundle_site, pull_site
from tests.services.pull_site import SitePeer
from tests.store.fakes import flip, in_place

DATA = bundle_site.model_data(12)


async def bundle(folder: Path, part_bytes: int = 0) -> list[Path]:
    async with bundle_site.open_site(folder / "a", 40) as site:
        await site.add("small", DATA)
        return await site.export(folder / "stick", part_bytes=part_bytes)


async def holder_of(site: pull_site.Site, folder: Path) -> SitePeer:
    """A peer that has the very model of the bundle."""
    peer = await site.peer()
    manifest = await peer.store.models.ingest(folder / "a" / "source.gguf", False, lambda _done, _size: None)
    stored = await peer.store.models.put(parse_name("small"), manifest.raw, None)
    stored = await peer.store.models.put(parse_name("small"), manifest.raw, peer.record_of(stored))
    peer.state = "disk"
    site.names[parse_name("small").key] = stored.manifest.digest
    return peer


def importer(peer: SitePeer, holder: SitePeer) -> Importer:
    digest = peer.site.names[parse_name("small").key]
    entry = CatalogEntry("small:latest", digest, 1, 0.0, ModelDetails(), False, (holder.peer_id,))
    world = ImportWorld(peer.store.blobs, peer.store.models, in_place, peer.pulls.held, peer.on_stored)
    return Importer(world, Mesh(lambda: (entry,), peer.pulls, peer.sources))


async def no_lines(_line: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


async def test_an_import_takes_the_chunks_of_a_missing_part_from_a_peer_and_the_rest_from_both(
    tmp_path: Path, autojump_clock: object
) -> None:
    files = await bundle(tmp_path, 4 * MIB + 100_000)
    files[1].unlink()
    async with pull_site.open_site() as site:
        holder = await holder_of(site, tmp_path)
        peer = await site.peer()
        await importer(peer, holder).run([tmp_path / "stick"], no_lines)
        stored = await peer.store.models.models()
        assert [one.name for one in stored] == ["small:latest"]
        assert peer.store.blobs.content(pull_site.sha256_of(DATA)) == DATA
        (transfer,) = [t for t in peer.pulls.transfers() if t.direction == "in"]
        given = {name: given.bytes for name, given in transfer.peers.items()}
        assert given["local:bundle small-latest"] > 0  # type: ignore[index]
        assert given[holder.peer_id] >= 4 * CHUNK_BYTES


async def test_chunks_that_are_damaged_in_the_bundle_come_from_a_peer_and_nobody_is_struck(
    tmp_path: Path, autojump_clock: object
) -> None:
    (file,) = await bundle(tmp_path)
    for chunk in range(5):
        flip(file, file.stat().st_size - 1 - chunk * CHUNK_BYTES)
    async with pull_site.open_site() as site:
        holder = await holder_of(site, tmp_path)
        peer = await site.peer()
        await importer(peer, holder).run([file], no_lines)
        assert peer.store.blobs.content(pull_site.sha256_of(DATA)) == DATA
        (transfer,) = [t for t in peer.pulls.transfers() if t.direction == "in"]
        assert all(not given.strikes for given in transfer.peers.values())
        assert transfer.bytes_wasted == 0


async def test_an_import_alone_asks_no_peer(tmp_path: Path, autojump_clock: object) -> None:
    files = await bundle(tmp_path, 4 * MIB + 100_000)
    files[1].unlink()
    async with pull_site.open_site() as site:
        holder = await holder_of(site, tmp_path)
        peer = await site.peer()
        with pytest.raises(BlobNotFound, match="number 2"):
            await importer(peer, holder).run([tmp_path / "stick"], no_lines, alone=True)
        assert not holder.served(pull_site.sha256_of(DATA))


async def test_when_the_peer_leaves_too_the_import_says_which_parts_are_missing(
    tmp_path: Path, autojump_clock: object
) -> None:
    files = await bundle(tmp_path, 4 * MIB + 100_000)
    files[1].unlink()
    async with pull_site.open_site() as site:
        holder = await holder_of(site, tmp_path)
        peer = await site.peer()
        imports = importer(peer, holder)
        holder.swarm.close()
        with pytest.raises(BlobNotFound, match="number 2"):
            await imports.run([tmp_path / "stick"], no_lines)


async def test_a_source_offers_the_chunks_of_the_parts_that_are_there_and_no_damaged_one(tmp_path: Path) -> None:
    files = await bundle(tmp_path, 4 * MIB + 100_000)
    files[0].unlink()
    flip(files[1], files[1].stat().st_size - 1)
    (reader,), bad = find_bundles([tmp_path / "stick"])
    assert not bad
    manifest = parse_manifest(reader.index.models[0].manifest)
    big = max(manifest.blobs, key=lambda blob: blob.size)
    told: list[str] = []
    source = BundleSource(reader, in_place, told.append)
    haves = await source.haves(big.digest)
    assert haves is not None
    first = min(index for index in range(haves.count) if index in haves)
    assert 0 < first < haves.count
    assert haves.total == haves.count - first
    damaged = max(pieces_of(reader, big.digest, files[1]))
    with pytest.raises(StoreCorrupt):
        await source.read_chunk(big.digest, damaged)
    assert told == [big.digest]
    with pytest.raises(BlobNotFound):
        await source.read_chunk(big.digest, 0)
    offset = CHUNK_BYTES * (haves.count - 1)
    assert await source.read_chunk(big.digest, haves.count - 1) == DATA[offset:]
    assert await source.haves(pull_site.sha256_of(b"another")) is None


def pieces_of(reader: Any, digest: str, path: Path) -> list[int]:
    from meshmax.wire.bundle import chunks_of

    return [index for where, piece in reader.pieces(digest) if where == path for index in chunks_of(piece)]


async def test_an_import_beside_a_paused_pull_takes_the_bundle_alone_and_leaves_the_pull_paused(
    tmp_path: Path, autojump_clock: object
) -> None:
    files = await bundle(tmp_path)
    said: list[str] = []

    async def tell(line: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        said.append(line["status"])

    async with pull_site.open_site() as site:
        holder, taker = await holder_of(site, tmp_path), await site.peer()
        begun = await taker.pulls.start_download("small")
        await taker.pulls.steer(begun.id, "pause")
        with trio.fail_after(60):
            await importer(taker, holder).run(files, tell)
        assert "the pull of small:latest is paused: from the bundle alone" in said
        assert said[-1] == "success"
        assert [one.name for one in await taker.store.models.models()] == ["small:latest"]
        (transfer,) = [t for t in taker.pulls.transfers() if t.id == begun.id]
        assert transfer.state == "paused"
        await taker.pulls.steer(begun.id, "resume")
        with trio.fail_after(60):
            async with taker.pulls.open_pull("small") as values:
                states = [value.state async for value in values]
        assert states[-1] == "done"
