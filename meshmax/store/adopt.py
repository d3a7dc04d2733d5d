"""Adopting models that other programs hold on this machine: Ollama's store, the cache of Hugging Face. Nothing is copied.

Rules: a blob gets a second name in our store, by the first of these that works: a hard link, shared blocks (reflink), a
reference in place (a symbolic link). Its bytes are checked when its chunk map is made, as for every blob that was not
taken in by us; one that vanishes later is no longer offered. Files are only read; what is no model, or not whole, is passed over
with its reason. Blocking; called through RunSync. Not here: names in the mesh, records (services.catalog).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from meshmax.base.errors import BlobNotFound, InvalidName, InvalidRequest, ManifestInvalid, MeshmaxError
from meshmax.base.ids import Sha256
from meshmax.base.model import MAX_MANIFEST_BYTES, Manifest
from meshmax.base.names import ModelName, parse_name
from meshmax.store.disk import Disk, temp_name, translated, try_read
from meshmax.store.ingest import read_header
from meshmax.store.layout import MAX_NAMES, Layout
from meshmax.wire.manifest import parse_manifest

Way = Literal["here", "linked", "cloned", "referenced"]

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_QUANTIZATION: Final = re.compile(r"(?:^|[-._])((?:I?Q\d\w*|BF16|F16|F32|MXFP4\w*))$", re.IGNORECASE)
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$")
_NOT_IN_A_TAG: Final = re.compile(r"[^A-Za-z0-9_.-]")


class Foreign(msgspec.Struct, frozen=True):
    """A model of another program: its name here, and the file of each blob. ``manifest`` None: of a GGUF file alone, ``gguf``."""

    name: ModelName
    manifest: Manifest | None
    blobs: dict[Sha256, Path]
    gguf: Sha256 | None = None


class Passed(msgspec.Struct, frozen=True):
    """Something that looks like a model and cannot be adopted: what, and why not."""

    what: str
    reason: str


def find_ollama(folder: Path) -> Iterator[Foreign | Passed]:
    """The models of Ollama's store at ``folder`` (``~/.ollama/models``). Raises InvalidRequest if it is none."""
    manifests, blobs = folder / "manifests", folder / "blobs"
    if not (manifests.is_dir() and blobs.is_dir()):
        raise InvalidRequest(
            f"{folder} is no Ollama store: it has no folders manifests and blobs (~/.ollama/models has)"
        )
    for count, path in enumerate(sorted(manifests.glob("*/*/*/*"))):
        if count >= MAX_NAMES:
            yield Passed(str(folder), f"only the first {MAX_NAMES} models are looked at")
            return
        host, namespace, model, tag = path.parts[-4:]
        try:
            name = parse_name(f"{host}/{namespace}/{model}:{tag}")
            manifest = parse_manifest(try_read(path, MAX_MANIFEST_BYTES) or b"")
            found = {layer.digest: blobs / f"sha256-{layer.digest}" for layer in manifest.blobs}
            for layer in manifest.blobs:
                require_file(found[layer.digest], layer.size)
            yield Foreign(name, manifest, found)
        except (InvalidName, ManifestInvalid, BlobNotFound) as error:
            yield Passed(f"{model}:{tag}"[:200], error.message)
        except OSError as error:
            yield Passed(f"{model}:{tag}"[:200], f"it cannot be read: {error.strerror}")


def find_huggingface(folder: Path) -> Iterator[Foreign | Passed]:
    """The GGUF files in a cache of Hugging Face (``~/.cache/huggingface/hub``), newest revisions. Raises InvalidRequest."""
    repositories = sorted(path for path in folder.glob("models--*--*") if path.is_dir())
    if not repositories:
        raise InvalidRequest(f"{folder} is no Hugging Face cache: it has no folders models--ORG--NAME")
    for repository in repositories[:MAX_NAMES]:
        organisation, _, model = repository.name.removeprefix("models--").partition("--")
        snapshot = _newest_snapshot(repository)
        for path in sorted(snapshot.rglob("*.gguf"))[:MAX_NAMES] if snapshot else ():
            what = f"{organisation}/{model}/{path.name}"[:200]
            try:
                yield _from_huggingface(organisation, model, path)
            except MeshmaxError as error:
                yield Passed(what, error.message)
            except OSError as error:
                yield Passed(what, f"it cannot be read: {error.strerror}")


def _newest_snapshot(repository: Path) -> Path | None:
    head = try_read(repository / "refs" / "main", 256)
    snapshots = [path for path in (repository / "snapshots").glob("*") if path.is_dir()]
    named = [path for path in snapshots if head and path.name == head.decode(errors="replace").strip()]
    return named[0] if named else max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _from_huggingface(organisation: str, model: str, path: Path) -> Foreign:
    if _SHARD.search(path.stem):
        raise InvalidRequest("a GGUF in several files; only whole ones are taken")
    real = path.resolve(strict=True)
    if not _DIGEST.fullmatch(real.name):
        raise InvalidRequest("its file is not named by its sha256; take it in with `meshmax add NAME FILE`")
    found = _QUANTIZATION.search(path.stem)
    tag = found[1] if found else _NOT_IN_A_TAG.sub("_", path.stem)[:80]
    read_header(real)
    digest = Sha256(real.name)
    return Foreign(parse_name(f"hf.co/{organisation}/{model}:{tag}"), None, {digest: real}, digest)


def require_file(path: Path, size: int) -> None:
    """Raise BlobNotFound unless ``path`` is a file of ``size`` bytes."""
    try:
        found = path.stat()
    except OSError:
        raise BlobNotFound(f"blob {path.name} is missing") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise BlobNotFound(f"blob {path.name} has {found.st_size} bytes, not {size}: it is not whole")


def adopt_blob(layout: Layout, disk: Disk, digest: Sha256, source: Path) -> Way:
    """Let the blob ``digest`` of our store be the file ``source``. Raises StoreFull, StoreError."""
    with translated(f"blob {digest[:12]} was not adopted"):
        real = source.resolve(strict=True)
        target = layout.blob(digest)
        with suppress(OSError):
            if target.stat().st_size == real.stat().st_size:
                return "here"
        temp = temp_name(layout.partials)
        try:
            way = _second_name(disk, real, temp)
            disk.move_in(temp, target)
        finally:
            disk.unlink(temp)  # renaming a hard link over another name of the same file leaves both
        return way


def _second_name(disk: Disk, real: Path, temp: Path) -> Way:
    with suppress(OSError):  # another file system, another owner, too many links: each has a next best
        disk.link(real, temp)
        return "linked"
    fd = disk.create(temp)
    try:
        with real.open("rb") as file:
            if disk.try_clone(file.fileno(), fd):
                disk.sync(fd)
                return "cloned"
    finally:
        os.close(fd)
    disk.unlink(temp)
    disk.refer(real, temp)
    return "referenced"
