"""store.adopt, and the store over what was adopted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meshmax.base.errors import BlobNotFound, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name
from meshmax.store import Store, open_store
from meshmax.store.adopt import Foreign, Passed, find_huggingface, find_ollama
from meshmax.store.disk import Disk
from meshmax.testing.gguf import build_gguf
from tests.store.fakes import in_place


def put_blob(folder: Path, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"sha256-{digest}").write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def make_ollama(folder: Path, name: str = "library/llama3/8b", seed: int = 0) -> Path:
    """A store as Ollama leaves it, with one model."""
    config = {"mediaType": "application/vnd.docker.container.image.v1+json"}
    config |= put_blob(folder / "blobs", b'{"model_format":"gguf"}')  # type: ignore[arg-type]
    layer = {"mediaType": "application/vnd.ollama.image.model"}
    layer |= put_blob(folder / "blobs", build_gguf(tensor_bytes=4096, seed=seed))  # type: ignore[arg-type]
    manifest = folder / "manifests" / "registry.ollama.ai" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    media_type = "application/vnd.docker.distribution.manifest.v2+json"
    manifest.write_text(json.dumps({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]}))
    return folder


def found_in(folder: Path) -> list[Foreign]:
    return [one for one in find_ollama(folder) if isinstance(one, Foreign)]


async def adopt_all(store: Store, folder: Path) -> list[str]:
    return [(await store.models.adopt(one))[1] for one in found_in(folder)]


async def test_an_ollama_store_is_adopted_without_a_second_copy(tmp_path: Path) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place) as store:
        assert await adopt_all(store, ollama) == ["linked"]
        (model,) = await store.models.models()
        assert model.name == "llama3:8b"
        for blob in model.manifest.blobs:
            assert (await store.blobs.path(blob.digest)).samefile(ollama / "blobs" / f"sha256-{blob.digest}")
            known = await store.blobs.haves(blob.digest)
            assert known is not None
            assert known[1].whole
        assert await adopt_all(store, ollama) == ["here"]


class _NoLinks(Disk):
    def link(self, source: Path, destination: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    def try_clone(self, source_fd: int, destination_fd: int) -> bool:
        return False


async def test_where_links_and_clones_do_not_work_files_are_referenced_and_vanishing_is_noticed(tmp_path: Path) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place, _NoLinks()) as store:
        assert await adopt_all(store, ollama) == ["referenced"]
        (model,) = await store.models.models()
        largest = max(model.manifest.blobs, key=lambda blob: blob.size).digest
        assert (await store.blobs.read_chunk(largest, 0)).startswith(b"GGUF")
        (ollama / "blobs" / f"sha256-{largest}").unlink()
        assert await store.models.models() == ()
        with pytest.raises(BlobNotFound):
            await store.blobs.read_chunk(largest, 0)


async def test_deleting_an_adopted_model_leaves_the_other_program_its_files(tmp_path: Path) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place, _NoLinks()) as store:
        await adopt_all(store, ollama)
        await store.models.delete(parse_name("llama3:8b"))
    assert len(list((ollama / "blobs").iterdir())) == 2


async def test_a_blob_that_is_not_what_its_name_says_is_never_served(tmp_path: Path) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    (manifest,) = (one.manifest for one in found_in(ollama))
    assert manifest is not None
    largest = max(manifest.blobs, key=lambda blob: blob.size)
    (ollama / "blobs" / f"sha256-{largest.digest}").write_bytes(bytes(largest.size))
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place) as store:
        await adopt_all(store, ollama)
        assert await store.blobs.haves(largest.digest) is None


async def test_a_name_that_means_another_model_here_is_not_taken_over(tmp_path: Path) -> None:
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place) as store:
        await adopt_all(store, make_ollama(tmp_path / "one"))
        with pytest.raises(InvalidRequest, match="another model here"):
            await adopt_all(store, make_ollama(tmp_path / "two", seed=1))


@pytest.mark.parametrize("disk", [Disk, _NoLinks])
async def test_repairing_an_adopted_blob_never_writes_to_the_other_programs_file(
    tmp_path: Path, disk: type[Disk]
) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place, disk()) as store:
        await adopt_all(store, ollama)
        (model,) = await store.models.models()
        largest = max(model.manifest.blobs, key=lambda blob: blob.size).digest
        good = await store.blobs.read_chunk(largest, 0)
        theirs = ollama / "blobs" / f"sha256-{largest}"
        theirs.write_bytes(bytes(len(good)))
        assert (await store.blobs.verify(largest)).total == 0
        known = await store.blobs.haves(largest)
        assert known is not None
        fetched = await store.blobs.open_partial(known[0])
        await fetched.write(0, good)
        await fetched.finish()
        assert theirs.read_bytes() == bytes(len(good))
        assert await store.blobs.read_chunk(largest, 0) == good


def test_what_is_not_whole_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    ollama = make_ollama(tmp_path / "ollama")
    make_ollama(ollama, "library/broken/latest", seed=2)
    for path in (ollama / "blobs").iterdir():
        if path.read_bytes() == build_gguf(tensor_bytes=4096, seed=2):
            path.write_bytes(b"GGUF")
    bad = ollama / "manifests" / "registry.ollama.ai" / "library" / "nonsense" / "latest"
    bad.parent.mkdir()
    bad.write_text("{")
    passed = {one.what: one.reason for one in find_ollama(ollama) if isinstance(one, Passed)}
    assert set(passed) == {"broken:latest", "nonsense:latest"}
    assert "not whole" in passed["broken:latest"]


@pytest.mark.parametrize("find", [find_ollama, find_huggingface])
def test_a_folder_of_something_else_is_an_error(tmp_path: Path, find: Callable[[Path], object]) -> None:
    with pytest.raises(InvalidRequest, match="is no"):
        list(find(tmp_path))  # type: ignore[call-overload]


def make_huggingface(folder: Path, file: str = "tiny-Q4_K_M.gguf") -> Path:
    repository = folder / "models--acme--tiny-GGUF"
    data = build_gguf(tensor_bytes=4096, seed=3)
    digest = hashlib.sha256(data).hexdigest()
    for part in ("blobs", "snapshots/abc", "refs"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / digest).write_bytes(data)
    (repository / "snapshots" / "abc" / file).symlink_to(f"../../blobs/{digest}")
    (repository / "refs" / "main").write_text("abc")
    return folder


async def test_a_cache_of_hugging_face_is_adopted_under_its_names(tmp_path: Path) -> None:
    cache = make_huggingface(tmp_path / "hub")
    async with open_store(tmp_path / "ours", tmp_path / "state", in_place) as store:
        (found,) = find_huggingface(cache)
        assert isinstance(found, Foreign)
        stored, way = await store.models.adopt(found)
        assert (stored.name, way) == ("hf.co/acme/tiny-GGUF:Q4_K_M", "linked")
        assert stored.details.context_length == 2048
        known = await store.blobs.haves(Sha256(next(iter(found.blobs))))
        assert known is not None


def test_a_model_in_several_files_is_passed_over(tmp_path: Path) -> None:
    (found,) = find_huggingface(make_huggingface(tmp_path / "hub", "tiny-Q8_0-00001-of-00002.gguf"))
    assert isinstance(found, Passed)
    assert "several files" in found.reason
