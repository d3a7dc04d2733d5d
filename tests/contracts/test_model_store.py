"""What every ports.ModelStore does, on disk and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshmax.base.errors import BlobNotFound, InvalidRequest, ManifestInvalid, ModelNotFound, StoreFull
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import MODEL_MEDIA_TYPE, Signed, StoredModel
from meshmax.base.names import parse_name
from meshmax.ports import BlobStore, ModelStore
from meshmax.store import open_store
from meshmax.testing.gguf import build_gguf
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from meshmax.wire.manifest import build_manifest
from tests.store.fakes import FullDisk, in_place

RECORD = Signed(PeerId("12D3KooWsomebody"), b"payload", b"s" * 64)


class Subject:
    def __init__(self, models: ModelStore, blobs: BlobStore, folder: Path, full: object) -> None:
        self.models, self.blobs, self.folder, self._full = models, blobs, folder, full

    def fill(self, full: bool) -> None:
        self._full.full = full  # type: ignore[attr-defined]

    def file(self, seed: int = 0, **values: object) -> Path:
        path = self.folder / f"model-{seed}.gguf"
        path.write_bytes(build_gguf({key.replace("__", "."): v for key, v in values.items()}, 3 << 20, seed))
        return path

    async def add(self, name: str, seed: int = 0, record: Signed | None = None) -> StoredModel:
        manifest = await self.models.ingest(self.file(seed), False, lambda _done, _size: None)
        return await self.models.put(parse_name(name), manifest.raw, record)

    async def names(self) -> list[str]:
        return sorted(model.name for model in await self.models.models())


@pytest.fixture(params=["memory", "files"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param == "memory":
        memory = MemoryBlobStore()
        yield Subject(MemoryModelStore(memory), memory, tmp_path, memory)
        return
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        yield Subject(store.models, store.blobs, tmp_path, disk)


async def test_an_empty_store_has_no_models(subject: Subject) -> None:
    assert await subject.models.models() == ()


async def test_a_file_becomes_a_model_under_a_name(subject: Subject) -> None:
    progress: list[tuple[int, int]] = []
    path = subject.file()
    manifest = await subject.models.ingest(path, False, lambda done, size: progress.append((done, size)))
    assert await subject.models.models() == ()
    stored = await subject.models.put(parse_name("Tiny"), manifest.raw, RECORD)
    assert await subject.models.models() == (stored,)
    assert (stored.name, stored.record, stored.manifest) == ("Tiny:latest", RECORD, manifest)
    assert stored.details.family == "llama"
    assert stored.details.context_length == 2048
    assert stored.details.capabilities == ("completion",)
    size = path.stat().st_size
    assert progress[-1] == (size, size)
    layer = manifest.layer(MODEL_MEDIA_TYPE)
    assert layer is not None
    assert layer.size == size
    assert all([(await subject.blobs.verify(blob.digest)).whole for blob in manifest.blobs])


@pytest.mark.parametrize("content", [b"", b"no model", build_gguf(tensor_bytes=4096)[:-1], build_gguf()[:100]])
async def test_a_file_that_is_no_model_is_refused(subject: Subject, content: bytes) -> None:
    path = subject.folder / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"bad\.gguf"):
        await subject.models.ingest(path, False, lambda _done, _size: None)


@pytest.mark.parametrize("name", ["missing.gguf", "."])
async def test_a_file_that_cannot_be_read_is_refused(subject: Subject, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await subject.models.ingest(subject.folder / name, False, lambda _done, _size: None)


async def test_a_full_disk_takes_no_model_in(subject: Subject) -> None:
    path = subject.file()
    subject.fill(True)
    with pytest.raises(StoreFull):
        await subject.models.ingest(path, False, lambda _done, _size: None)
    subject.fill(False)
    await subject.add("tiny")
    assert await subject.names() == ["tiny:latest"]


async def test_an_existing_spelling_of_a_name_is_kept(subject: Subject) -> None:
    await subject.add("Library/Tiny:Big")
    stored = await subject.add("library/TINY:big", seed=1)
    assert stored.name == "Library/Tiny:Big"
    assert await subject.names() == ["Library/Tiny:Big"]


async def test_a_name_means_the_last_thing_that_was_put(subject: Subject) -> None:
    first = await subject.add("tiny", seed=1, record=RECORD)
    second = await subject.add("tiny", seed=2)
    assert await subject.models.models() == (second,)
    assert second.record is None
    assert await subject.blobs.haves(first.manifest.layers[0].digest) is None


async def test_models_are_listed_newest_first(subject: Subject) -> None:
    for seed, name in enumerate(["a", "b", "c"]):
        await subject.add(name, seed)
    stamps = [model.modified_at_s for model in await subject.models.models()]
    assert stamps == sorted(stamps, reverse=True)


async def test_a_manifest_needs_its_blobs(subject: Subject) -> None:
    manifest = (await subject.add("tiny")).manifest
    unknown = manifest.layers[0].__class__(MODEL_MEDIA_TYPE, Sha256("a" * 64), 5)
    with pytest.raises(BlobNotFound):
        await subject.models.put(parse_name("x"), build_manifest(manifest.config, [unknown]), None)
    with pytest.raises(ManifestInvalid):
        await subject.models.put(parse_name("x"), b"{}", None)
    wrong_size = manifest.layers[0].__class__(MODEL_MEDIA_TYPE, manifest.layers[0].digest, 5)
    with pytest.raises(BlobNotFound):
        await subject.models.put(parse_name("x"), build_manifest(manifest.config, [wrong_size]), None)
    assert await subject.names() == ["tiny:latest"]


async def test_a_copy_is_another_name_for_the_same_model_without_its_record(subject: Subject) -> None:
    stored = await subject.add("tiny", record=RECORD)
    await subject.models.copy(parse_name("TINY"), parse_name("me/other:v1"))
    copies = {model.name: model for model in await subject.models.models()}
    assert copies["me/other:v1"].manifest == stored.manifest
    assert copies["me/other:v1"].record is None
    assert copies["tiny:latest"].record == RECORD
    with pytest.raises(ModelNotFound, match="nothing"):
        await subject.models.copy(parse_name("nothing"), parse_name("x"))


async def test_deleting_removes_what_nothing_refers_to_any_more(subject: Subject) -> None:
    stored = await subject.add("tiny")
    await subject.models.copy(parse_name("tiny"), parse_name("other"))
    await subject.models.delete(parse_name("Tiny"))
    assert await subject.names() == ["other:latest"]
    layer = stored.manifest.layers[0]
    assert (await subject.blobs.verify(layer.digest)).whole
    await subject.models.delete(parse_name("other"))
    assert await subject.models.models() == ()
    assert await subject.blobs.haves(layer.digest) is None
    with pytest.raises(ModelNotFound, match="other"):
        await subject.models.delete(parse_name("other"))


async def test_a_model_says_what_it_is(subject: Subject) -> None:
    stored = await subject.add("tiny")
    description = await subject.models.describe(stored.manifest.digest)
    assert description.details == stored.details
    assert description.model_info["llama.context_length"] == 2048
    assert description.model_info["tokenizer.ggml.tokens"] == []
    assert "general.name" not in description.model_info
    assert "tokenizer.chat_template" not in description.model_info
    assert description.template.startswith("{% for message")
    assert description.tensors == ()
    verbose = await subject.models.describe(stored.manifest.digest, verbose=True)
    assert verbose.model_info["tokenizer.ggml.tokens"] == ["a", "b", "c", "d", "e", "f"]
    assert [(each.name, each.type) for each in verbose.tensors] == [("weights", "F32")]
    with pytest.raises(ModelNotFound):
        await subject.models.describe(Sha256("0" * 64))
