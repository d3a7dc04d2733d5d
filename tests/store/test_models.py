"""Names and manifests on disk: Ollama's own stores, broken files, records, and the ways in which a file is taken in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from meshmax.base.errors import InvalidRequest, ModelNotFound, StoreError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import (
    CONFIG_MEDIA_TYPE,
    LICENSE_MEDIA_TYPE,
    MODEL_MEDIA_TYPE,
    PARAMS_MEDIA_TYPE,
    SYSTEM_MEDIA_TYPE,
    TEMPLATE_MEDIA_TYPE,
    Haves,
    Layer,
    Manifest,
    Signed,
    StoredModel,
)
from meshmax.base.names import parse_name
from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from meshmax.store.disk import Disk
from meshmax.store.models import FileModelStore
from meshmax.testing.gguf import build_gguf
from meshmax.wire.chunkmap import chunk_map_of_bytes
from meshmax.wire.manifest import build_manifest, parse_manifest
from tests.store.fakes import blob_file, in_place

RECORD = Signed(PeerId("12D3KooWx"), b"payload", b"s" * 64)
GGUF = build_gguf(tensor_bytes=MIB)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as opened:
        yield opened


def silent(_done: int, _size: int) -> None:
    pass


def layer(models: Path, media_type: str, data: bytes) -> Layer:
    digest = chunk_map_of_bytes(data).sha256
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    blob_file(models, digest).write_bytes(data)
    return Layer(media_type, digest, len(data))


def ollama_model(models: Path, name: str, gguf: bytes = GGUF, texts: dict[str, bytes] | None = None) -> Manifest:
    """A model as `ollama pull` leaves it."""
    config = layer(
        models,
        CONFIG_MEDIA_TYPE,
        b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"8.0B","file_type":"Q4_0"}',
    )
    layers = [layer(models, MODEL_MEDIA_TYPE, gguf)]
    layers += [layer(models, media_type, data) for media_type, data in (texts or {}).items()]
    raw = json.dumps(json.loads(build_manifest(config, layers)), indent=2).encode()
    path = models.joinpath("manifests", *parse_name(name).path_parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return parse_manifest(raw)


async def add(store: Store, folder: Path, name: str = "tiny", record: Signed | None = None) -> StoredModel:
    path = folder / "source.gguf"
    path.write_bytes(GGUF)
    manifest = await store.models.ingest(path, False, silent)
    return await store.models.put(parse_name(name), manifest.raw, record)


async def test_an_ollama_store_is_used_where_it_lies(store: Store, tmp_path: Path) -> None:
    manifest = ollama_model(tmp_path / "models", "llama3:8b")
    (model,) = await store.models.models()
    assert (model.name, model.manifest) == ("llama3:8b", manifest)
    assert model.details.parameter_size == "8.0B"
    assert model.details.context_length == 2048
    found = await store.blobs.haves(manifest.layers[0].digest)
    assert found is not None
    assert found[1] == Haves.all(found[0].count)


async def test_a_model_of_ours_lies_where_ollama_looks_for_it(store: Store, tmp_path: Path) -> None:
    stored = await add(store, tmp_path, "me/tiny:q4")
    path = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "me" / "tiny" / "q4"
    assert path.read_bytes() == stored.manifest.raw
    assert sorted(path.name for path in (tmp_path / "models" / "blobs").iterdir()) == sorted(
        f"sha256-{blob.digest}" for blob in stored.manifest.blobs
    )
    assert blob_file(tmp_path / "models", stored.manifest.layers[0].digest).read_bytes() == GGUF


async def test_the_texts_of_a_model_are_described(store: Store, tmp_path: Path) -> None:
    texts = {
        TEMPLATE_MEDIA_TYPE: b"{{ .Prompt }}{{ .Tools }}",
        SYSTEM_MEDIA_TYPE: b"Be kind.",
        LICENSE_MEDIA_TYPE: b"Apache",
        PARAMS_MEDIA_TYPE: b'{"stop":["<|end|>"]}',
    }
    manifest = ollama_model(tmp_path / "models", "x", texts=texts)
    told = await store.models.describe(manifest.digest)
    assert (told.template, told.system, told.license) == ("{{ .Prompt }}{{ .Tools }}", "Be kind.", "Apache")
    assert told.parameters == {"stop": ["<|end|>"]}
    assert told.details.capabilities == ("completion", "tools")


async def test_models_that_are_broken_are_left_out_and_the_others_listed(store: Store, tmp_path: Path) -> None:
    models = tmp_path / "models"
    good = ollama_model(models, "good")
    gone = ollama_model(models, "gone", build_gguf(tensor_bytes=64, seed=1))
    blob_file(models, gone.layers[0].digest).unlink()
    short = ollama_model(models, "short", build_gguf(tensor_bytes=64, seed=2))
    blob_file(models, short.layers[0].digest).write_bytes(b"GGUF")
    folder = models / "manifests" / "registry.ollama.ai" / "library"
    for name, content in {"empty": b"", "huge": b" " * (1 << 20), "json": b"{}"}.items():
        (folder / name).mkdir()
        (folder / name / "latest").write_bytes(content)
    (folder / "no.good name!").mkdir()
    (folder / "no.good name!" / "latest").write_bytes(good.raw)
    (folder / "folder" / "latest").mkdir(parents=True)
    (folder / "stray").write_bytes(b"x")
    (folder / "loop").mkdir()
    (folder / "loop" / "latest").symlink_to("latest")
    assert [model.name for model in await store.models.models()] == ["good:latest"]


async def test_a_blob_that_is_no_gguf_leaves_facts_out(store: Store, tmp_path: Path) -> None:
    manifest = ollama_model(tmp_path / "models", "odd", b"safetensors")
    (model,) = await store.models.models()
    assert (model.details.family, model.details.context_length) == ("llama", 0)
    assert (await store.models.describe(manifest.digest)).model_info == {}


async def test_records_and_facts_are_there_after_a_restart(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        stored = await add(store, tmp_path, record=RECORD)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        assert await store.models.models() == (stored,)


async def test_a_record_counts_only_for_the_manifest_that_it_was_put_with(store: Store, tmp_path: Path) -> None:
    await add(store, tmp_path, record=RECORD)
    ollama_model(tmp_path / "models", "tiny", build_gguf(tensor_bytes=64))
    (model,) = await store.models.models()
    assert model.record is None


async def test_a_model_that_is_put_again_stays_as_old_as_it_is(store: Store, tmp_path: Path) -> None:
    manifest = ollama_model(tmp_path / "models", "llama3")
    (first,) = await store.models.models()
    path = (tmp_path / "models").joinpath("manifests", *parse_name("llama3").path_parts)
    os.utime(path, (1000.0, 1000.0))
    again = await store.models.put(parse_name("llama3"), manifest.raw, RECORD)
    assert (first.record, again.record, again.modified_at_s) == (None, RECORD, 1000.0)


async def test_a_damaged_record_or_fact_file_is_as_none(store: Store, tmp_path: Path) -> None:
    stored = await add(store, tmp_path, record=RECORD)
    for folder in ("records", "details"):
        (path,) = (tmp_path / "state" / folder).iterdir()
        path.write_bytes(b"{")
    (model,) = await FileModelStore(store.blobs).models()
    assert model.record is None
    assert model.details == stored.details


async def test_deleting_keeps_every_blob_that_a_broken_manifest_names(store: Store, tmp_path: Path) -> None:
    stored = await add(store, tmp_path)
    digest = stored.manifest.layers[0].digest
    broken = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "library" / "broken" / "latest"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b'{"not quite a manifest": "sha256:' + digest.encode())
    await store.models.delete(parse_name("tiny"))
    assert blob_file(tmp_path / "models", digest).exists()
    await store.models.delete(parse_name("broken"))
    assert not broken.parent.exists()
    assert (tmp_path / "models" / "manifests").exists()


async def test_deleting_leaves_the_partials_of_pulls(store: Store, tmp_path: Path) -> None:
    stored = await add(store, tmp_path)
    chunk_map = chunk_map_of_bytes(b"x" * 5)
    partial = await store.blobs.open_partial(chunk_map)
    await store.models.delete(parse_name(stored.name))
    await partial.write(0, b"x" * 5)
    await partial.finish()
    assert (await store.blobs.path(chunk_map.sha256)).read_bytes() == b"x" * 5


async def test_taking_a_file_in_ends_an_idle_fetch_of_it(store: Store, tmp_path: Path) -> None:
    partial = await store.blobs.open_partial(chunk_map_of_bytes(GGUF))
    await partial.aclose()
    stored = await add(store, tmp_path)
    found = await store.blobs.haves(stored.manifest.layers[0].digest)
    assert found is not None
    assert found[1].whole
    assert not list((tmp_path / "state" / "partials").iterdir())


async def test_a_link_shares_the_file_and_a_copy_does_not(store: Store, tmp_path: Path) -> None:
    for link in (True, False):
        path = tmp_path / f"{link}.gguf"
        path.write_bytes(build_gguf(seed=int(link)))
        manifest = await store.models.ingest(path, link, silent)
        blob = await store.blobs.path(manifest.layers[0].digest)
        assert blob.samefile(path) == link
        again = await store.models.ingest(path, link, silent)
        assert again == manifest
    assert not list((tmp_path / "state" / "partials").iterdir())


class CloningDisk(Disk):
    """A file system that can share blocks."""

    def try_clone(self, source_fd: int, destination_fd: int) -> bool:
        os.pwrite(destination_fd, os.pread(source_fd, 1 << 30, 0), 0)
        return True


class UnlinkableDisk(Disk):
    """The source lies on another file system."""

    def link(self, source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


async def test_shared_blocks_are_hashed_as_they_lie_in_the_store(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, CloningDisk()) as store:
        stored = await add(store, tmp_path)
        assert (await store.blobs.verify(stored.manifest.layers[0].digest)).whole


async def test_a_link_across_file_systems_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(GGUF)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, UnlinkableDisk()) as store:
        with pytest.raises(StoreError, match="leave out --link"):
            await store.models.ingest(tmp_path / "x.gguf", True, silent)


@pytest.mark.parametrize("change", [GGUF + b"more", GGUF[: len(GGUF) // 2]])
async def test_a_file_that_changes_while_it_is_read_is_refused(store: Store, tmp_path: Path, change: bytes) -> None:
    path = tmp_path / "growing.gguf"
    path.write_bytes(GGUF)

    def grow(done: int, _size: int) -> None:
        if done == 0:
            path.write_bytes(change)

    with pytest.raises(InvalidRequest, match="growing"):
        await store.models.ingest(path, False, grow)
    assert not list((tmp_path / "models" / "blobs").iterdir())
    assert not list((tmp_path / "state" / "partials").iterdir())


async def test_a_cancelled_ingest_leaves_nothing(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build_gguf(tensor_bytes=70 * MIB))
    with trio.CancelScope() as scope:
        await store.models.ingest(path, False, lambda done, _size: scope.cancel() if done else None)
    assert scope.cancelled_caught
    assert not list((tmp_path / "models" / "blobs").iterdir())
    assert not list((tmp_path / "state" / "partials").iterdir())


async def test_a_digest_that_nothing_has_is_described_by_nobody(store: Store) -> None:
    with pytest.raises(ModelNotFound):
        await store.models.describe(Sha256("e" * 64))
