"""Reading bundles: which files belong together, and maps and chunks out of them.

Rules: files are grouped by the bundle that their headers name, not by their names; a damaged or foreign file costs only
itself, and is named. One good copy of the index is enough for all parts. What is read here is not verified but for the
index and the maps: whoever takes a chunk checks it by its map. Files are opened for each reading, so that a stick that
is pulled out costs an error and not the node. Blocking; called through RunSync.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import BlobNotFound, InvalidRequest, ManifestInvalid, StoreError
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.store.disk import read_at, translated
from meshmax.wire.bundle import (
    HEADER_BYTES,
    MAX_PARTS,
    SUFFIX,
    BundleIndex,
    Header,
    Part,
    Piece,
    bundle_id,
    chunks_of,
    decode_header,
    lay_out,
    open_index,
    split_part_name,
)
from meshmax.wire.chunkmap import decode_map, map_address

MAX_FILES: Final = 4 * MAX_PARTS  # looked at in one import


class BadFile(msgspec.Struct, frozen=True):
    """A file that is no use, and why."""

    path: Path
    reason: str


class BundleReader:
    """One bundle: its index, and those of its parts that are there (number -> file)."""

    def __init__(self, index: BundleIndex, envelope: bytes, files: dict[int, Path]) -> None:
        self.index = index
        self.id = bundle_id(envelope)
        self.parts = lay_out(index, len(envelope))
        self.files = files
        self.head_bytes = HEADER_BYTES + len(envelope)
        self._blobs = {blob.digest: blob for blob in index.blobs}
        self._pieces: dict[Sha256, list[tuple[Part, Piece]]] = {}
        for part in self.parts:
            for piece in part.pieces:
                self._pieces.setdefault(piece.blob.digest, []).append((part, piece))

    @property
    def name(self) -> str:
        """What to call it: the file's name without numbers."""
        first = self.files[min(self.files)].name
        numbered = split_part_name(first)
        return numbered[0] if numbered else first.removesuffix(SUFFIX)

    @property
    def missing(self) -> tuple[int, ...]:
        """The numbers of the parts that are not there."""
        return tuple(part.number for part in self.parts if part.number not in self.files)

    def carries(self, digest: Sha256) -> bool:
        """Whether any chunk of a blob is in the bundle, in a part that is there or not."""
        return digest in self._pieces

    def pieces(self, digest: Sha256) -> list[tuple[Path, Piece]]:
        """The pieces of a blob that are there, in order."""
        found = self._pieces.get(digest, [])
        return [(self.files[part.number], piece) for part, piece in found if part.number in self.files]

    def haves(self, digest: Sha256) -> Haves | None:
        """The chunks of a blob that should be in the parts that are there; None if the bundle is not about it."""
        blob = self._blobs.get(digest)
        if blob is None:
            return None
        bits = bytearray(Haves.none(blob.count).bits)
        for _, piece in self.pieces(digest):
            for index in chunks_of(piece):
                bits[index >> 3] |= 1 << (index & 7)
        return Haves(blob.count, bytes(bits))

    def read_map(self, digest: Sha256) -> ChunkMap | None:
        """The chunk map of a blob, from the first good copy; None where there is none. Raises StoreError."""
        for path, piece in self.pieces(digest):
            if (found := self.read_map_of(path, piece)) is not None:
                return found
        return None

    def read_map_of(self, path: Path, piece: Piece) -> ChunkMap | None:
        """The copy of a blob's map in this very part; None if it is damaged. Raises StoreError."""
        with translated(f"{path.name} was not read"):
            encoding = _read(path, piece.offset, piece.blob.map_bytes)
        if map_address(encoding) != piece.blob.address:
            return None
        try:
            chunk_map = decode_map(encoding)
        except ManifestInvalid:
            return None
        return chunk_map if (chunk_map.sha256, chunk_map.size) == (piece.blob.digest, piece.blob.size) else None

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """Read what should be this chunk, unverified: its length, 0 where the file is too short. Blocks; any thread.

        Raises BlobNotFound (not in the parts that are there), StoreError.
        """
        blob = self._blobs.get(digest)
        if blob is not None and index in blob.carried:
            below = int.from_bytes(blob.carried.bits, "little") & ((1 << index) - 1)
            at = below.bit_count()
            for path, piece in self.pieces(digest):
                if piece.first <= at < piece.last:
                    with translated(f"{path.name} was not read"), ChunkFile(path) as file:
                        return file.read(piece, at - piece.first, blob.length(index), buffer)
        raise BlobNotFound(f"chunk {index} of blob {digest[:12]} is not in the bundle")


class ChunkFile:
    """A part that is open for reading. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, piece: Piece, at: int, length: int, buffer: memoryview) -> int:
        """Read the piece's chunk ``at`` (from 0), of ``length`` bytes: how many were there."""
        return read_at(self._fd, buffer[:length], piece.chunks_offset + at * CHUNK_BYTES)


def find_bundles(paths: Iterable[Path]) -> tuple[list[BundleReader], list[BadFile]]:
    """Every bundle of which there are parts in ``paths`` (folders, or files with the parts beside them), and bad files.

    Raises InvalidRequest (no such path, too many files), StoreError.
    """
    by_bundle: dict[bytes, list[tuple[Path, Header]]] = {}
    bad: list[BadFile] = []
    for path in _files(paths):
        try:
            header = read_header(path)
            by_bundle.setdefault(header.bundle, []).append((path, header))
        except (ManifestInvalid, StoreError) as error:
            bad.append(BadFile(path, error.message))
    readers = []
    for files in by_bundle.values():
        reader, worse = _join(files)
        bad += worse
        readers += [reader] if reader else []
    return readers, bad


def _join(files: list[tuple[Path, Header]]) -> tuple[BundleReader | None, list[BadFile]]:
    """The bundle that these files are of."""
    bad: list[BadFile] = []
    found: tuple[BundleIndex, bytes] | None = None
    for path, header in files:
        try:
            envelope = read_envelope(path, header)
            found = found or (open_index(envelope), envelope)
        except (ManifestInvalid, StoreError) as error:
            bad.append(BadFile(path, error.message))
    if found is None:
        return None, bad
    index, envelope = found
    try:
        count = len(lay_out(index, len(envelope)))
    except InvalidRequest as error:
        return None, [BadFile(path, error.message) for path, _ in files]
    numbered: dict[int, Path] = {}
    for path, header in files:
        if header.parts != count or header.envelope_bytes != len(envelope):
            bad.append(BadFile(path, "the header of the bundle is damaged"))
        elif header.part not in numbered or _says(path) == header.part:
            numbered[header.part] = path
    return (BundleReader(index, envelope, numbered) if numbered else None), bad


def _says(path: Path) -> int:
    numbered = split_part_name(path.name)
    return numbered[1] if numbered else 1


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        with translated(f"{path} was not read"):
            for file in _files_of(path):
                if file not in seen:
                    seen.add(file)
                    yield file
        if len(seen) > MAX_FILES:
            raise InvalidRequest(f"more than {MAX_FILES} files are looked at in no import: name the bundle's files")


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.glob(f"*{SUFFIX}") if file.is_file())
        if not found:
            raise InvalidRequest(f"{path}: there is no bundle in this folder: its files end in {SUFFIX}")
        return found
    if not path.is_file():
        raise InvalidRequest(f"{path}: there is no such file or folder: give the bundle that an export wrote")
    numbered = split_part_name(path.name)
    if numbered is None:
        return [path]
    beside = (file for file in path.parent.glob(f"*{SUFFIX}") if file.is_file())
    return sorted(file for file in beside if (other := split_part_name(file.name)) and other[0] == numbered[0])


def read_header(path: Path) -> Header:
    """What a file says of itself. Raises ManifestInvalid, StoreError."""
    with translated(f"{path.name} was not read"):
        return decode_header(_read(path, 0, HEADER_BYTES))


def read_envelope(path: Path, header: Header) -> bytes:
    """The signed index in a file, if it is the one that its header names. Raises ManifestInvalid, StoreError."""
    with translated(f"{path.name} was not read"):
        envelope = _read(path, HEADER_BYTES, header.envelope_bytes)
    if bundle_id(envelope) != header.bundle:
        raise ManifestInvalid("the index in this file is damaged")
    return envelope


def _read(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < offset + length:  # before room is made for what a header claims
            return b""
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)
