"""Blobs that are pushed to us: bounded, swept, believed only by their digest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshmax.base.errors import BlobNotFound, Busy, IntegrityError, ManifestInvalid, StoreError
from meshmax.base.ids import Sha256
from meshmax.base.model import CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, Layer, Manifest, StoredModel
from meshmax.base.names import ModelName, parse_name
from meshmax.services.uploads import IDLE_S, KEPT_S, MAX_UPLOADS, SWEEP_S, Uploads, UploadUnknown, open_uploads
from meshmax.store import Store, open_store
from meshmax.wire.manifest import build_manifest, digest_of
from tests.store.fakes import in_place

NAME = parse_name("pushed")


class Site:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.published: list[StoredModel] = []
        self.uploads = Uploads(store.staging, store.blobs, self.publish, self.local, store.blobs.remove)

    async def publish(self, name: ModelName, manifest: Manifest) -> StoredModel:
        self.published.append(await self.store.models.put(name, manifest.raw, None))
        return self.published[-1]

    def local(self) -> tuple[StoredModel, ...]:
        return tuple(self.published)

    async def push(self, data: bytes) -> Layer:
        upload = await self.uploads.open()
        await self.uploads.write(upload, 0, data)
        await self.uploads.finish(upload, digest_of(data))
        return Layer(MODEL_MEDIA_TYPE, digest_of(data), len(data))


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        site = Site(store)
        async with open_uploads(site.uploads):
            yield site


def leftovers(tmp_path: Path) -> int:
    return len(list((tmp_path / "state" / "partials").iterdir()))


async def test_blobs_and_a_manifest_make_a_model(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        model, config = await site.push(b"weights"), await site.push(b"{}")
        raw = build_manifest(Layer(CONFIG_MEDIA_TYPE, config.digest, config.size), [model])
        stored = await site.uploads.put_manifest(NAME, raw)
        assert stored.manifest.raw == raw
        assert site.published == [stored]
        await trio.sleep(KEPT_S + 2 * SWEEP_S)
        assert await site.uploads.has(model.digest)


async def test_a_wrong_digest_loses_the_upload_and_makes_no_blob(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        upload = await site.uploads.open()
        await site.uploads.write(upload, 0, b"these bytes")
        with pytest.raises(IntegrityError):
            await site.uploads.finish(upload, digest_of(b"others"))
        with pytest.raises(UploadUnknown):
            site.uploads.get(upload.id)
        assert not await site.uploads.has(digest_of(b"these bytes"))
        assert leftovers(tmp_path) == 0


async def test_an_upload_with_a_gap_can_be_completed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        upload = await site.uploads.open()
        await site.uploads.write(upload, 5, b" bytes")
        with pytest.raises(StoreError, match="missing"):
            await site.uploads.finish(upload, digest_of(b"these bytes"))
        await site.uploads.write(site.uploads.get(upload.id), 0, b"these")
        assert upload.size == 11
        await site.uploads.finish(upload, digest_of(b"these bytes"))
        assert await site.uploads.has(digest_of(b"these bytes"))


async def test_a_blob_that_is_here_is_not_taken_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        layer = await site.push(b"weights")
        before = (await site.store.blobs.path(layer.digest)).stat()
        await site.push(b"weights")
        assert (await site.store.blobs.path(layer.digest)).stat().st_ino == before.st_ino
        assert leftovers(tmp_path) == 0


async def test_uploads_at_once_are_bounded(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        for _ in range(MAX_UPLOADS):
            last = await site.uploads.open()
        with pytest.raises(Busy):
            await site.uploads.open()
        await site.uploads.cancel(last)
        await site.uploads.open()


async def test_an_upload_that_hears_nothing_is_thrown_away(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        idle, used = await site.uploads.open(), await site.uploads.open()
        for at in range(12):
            await trio.sleep(IDLE_S / 10)
            await site.uploads.write(used, at, b"x")
        with pytest.raises(UploadUnknown):
            site.uploads.get(idle.id)
        assert site.uploads.get(used.id) is used
    assert leftovers(tmp_path) == 0


async def test_blobs_that_no_manifest_names_are_removed_after_an_hour(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with opened(tmp_path) as site:
        layer = await site.push(b"loose")
        await trio.sleep(KEPT_S - SWEEP_S)
        assert await site.uploads.has(layer.digest)
        await trio.sleep(3 * SWEEP_S)
        assert not await site.uploads.has(layer.digest)


async def test_a_manifest_of_what_is_not_here_is_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        config = await site.push(b"{}")
        lacking = Layer(MODEL_MEDIA_TYPE, Sha256("ab" * 32), 5)
        raw = build_manifest(Layer(CONFIG_MEDIA_TYPE, config.digest, config.size), [lacking])
        with pytest.raises(BlobNotFound, match="ab" * 32):
            await site.uploads.put_manifest(NAME, raw)
        wrong_size = build_manifest(Layer(CONFIG_MEDIA_TYPE, config.digest, config.size + 1), [])
        with pytest.raises(BlobNotFound):
            await site.uploads.put_manifest(NAME, wrong_size)
        with pytest.raises(ManifestInvalid):
            await site.uploads.put_manifest(NAME, b"{}")
        assert site.published == []


class Slow(Site):
    """A disk on which each removal, and each change of a name, takes a second."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.uploads = Uploads(store.staging, store.blobs, self.publish, self.local, self.remove)

    async def publish(self, name: ModelName, manifest: Manifest) -> StoredModel:
        await trio.sleep(1.0)
        return await super().publish(name, manifest)

    async def remove(self, digest: Sha256) -> None:
        await trio.sleep(1.0)
        await self.store.blobs.remove(digest)


@pytest.mark.parametrize("after_s", [each / 4 for each in range(-6, 18)])
async def test_blobs_whose_manifest_comes_at_whatever_moment_of_the_sweep_stay(
    after_s: float, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        site = Slow(store)
        async with open_uploads(site.uploads):
            pushed = [await site.push(data) for data in (b"{}", b"loose", b"weights")]
            raw = build_manifest(Layer(CONFIG_MEDIA_TYPE, pushed[0].digest, 2), [pushed[2]])
            await trio.sleep(KEPT_S + after_s)
            try:
                await site.uploads.put_manifest(NAME, raw)
            except BlobNotFound:
                assert after_s >= 0.0  # swept before; a client pushes again
            else:
                await trio.sleep(3 * SWEEP_S)
                assert all([await site.uploads.has(layer.digest) for layer in (pushed[0], pushed[2])])
            await trio.sleep(3 * SWEEP_S)
            assert not await site.uploads.has(pushed[1].digest)


async def test_a_blob_that_is_pushed_again_is_kept_for_another_hour(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with opened(tmp_path) as site:
        layer = await site.push(b"weights")
        await trio.sleep(KEPT_S - SWEEP_S)
        await site.push(b"weights")  # it is here, so nothing is taken
        await trio.sleep(3 * SWEEP_S)
        assert await site.uploads.has(layer.digest)


async def test_an_upload_that_goes_on_while_others_are_thrown_away_stays(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with opened(tmp_path) as site:
        idle, used = await site.uploads.open(), await site.uploads.open()
        close = idle.staged.aclose

        async def slow() -> None:
            await trio.sleep(1.0)
            await close()

        idle.staged.aclose = slow  # type: ignore[method-assign]
        await trio.sleep(IDLE_S + 0.5)
        await site.uploads.write(site.uploads.get(used.id), 0, b"x")
        await trio.sleep(2.0)
        assert site.uploads.get(used.id) is used
