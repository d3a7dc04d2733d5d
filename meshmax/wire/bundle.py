"""Bundles: models as files, to be carried between sites. What a part holds, byte by byte.

A bundle is one file or several parts. Each part: a header (magic, version, its number, how many there are, the index's
length, the bundle's id), the signed index, and for each piece of a blob in it the blob's chunk map and then chunks, in
order. Every part carries the index and the maps it needs, so that each can be checked and used without the others. Where
what lies follows from the index alone (`lay_out`), so nothing but hashes and one signature has to be believed: the
exporter's over the index (canonical CBOR under a domain string), which names manifests, maps and sizes; the id in each
header is the BLAKE3 of the signed index, so that parts of two bundles are told apart.
Decided here: form, bounds, layout. Not here: files (store), which chunks are needed (services), whether an exporter is trusted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from meshmax.base.errors import InvalidName, InvalidRequest, ManifestInvalid
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, MAX_MANIFEST_BYTES, Haves, Manifest, Signed
from meshmax.base.names import MAX_NAME, parse_name
from meshmax.base.status import MAX_PEER_NAME
from meshmax.base.units import GIB, MIB, format_bytes
from meshmax.wire.manifest import parse_manifest
from meshmax.wire.model import Hex64, max_map_bytes
from meshmax.wire.signed import BUNDLE_DOMAIN, canonical, decode_canonical, sign, verify

VERSION: Final = 1
MAGIC: Final = b"meshmax bundle\n\0"
MAX_INDEX_BYTES: Final = 16 * MIB  # manifests and records of a few hundred models; it is in every part
MAX_MODELS: Final = 1024
MAX_BLOBS: Final = 8192
MAX_PARTS: Final = 9999  # four digits in a part's name
FAT32_BYTES: Final = 4 * GIB - 1  # the longest file that FAT32 takes
SUFFIX: Final = ".meshmax"

NO_LIMIT: Final = 1 << 62  # bytes of a part

_HEADER: Final = struct.Struct(">16sHHIII32s")  # magic, version, 0, part, parts, length of the signed index, bundle id
HEADER_BYTES: Final = _HEADER.size
_ENVELOPE_FIELDS_BYTES: Final = 256  # a signed index but for its payload
_STEM_LENGTH: Final = 100  # characters of a part's name before its number
_PART_NAME: Final = re.compile(r"(.+)\.(\d{4})-of-(\d{4})" + re.escape(SUFFIX))
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]+")

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]


class BundleModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model: its full name, the manifest's very bytes, and its publisher's record if there is one."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
    manifest: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]
    record: Signed | None


class BundleBlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A blob of these models: its map's address and length, and which chunks are in the bundle (bits; None: all)."""

    sha256: Hex64
    size: Size
    map: Hex64
    map_bytes: Annotated[int, msgspec.Meta(ge=1)]
    chunks: bytes | None = None

    @property
    def digest(self) -> Sha256:
        """Its sha256."""
        return Sha256(self.sha256)

    @property
    def address(self) -> MapAddress:
        """Where its chunk map is."""
        return MapAddress(self.map)

    @property
    def count(self) -> int:
        """How many chunks the blob has, in the bundle or not."""
        return -(-self.size // CHUNK_BYTES)

    @property
    def carried(self) -> Haves:
        """The chunks that are in the bundle."""
        return Haves.all(self.count) if self.chunks is None else Haves(self.count, self.chunks)

    def length(self, chunk: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK_BYTES, self.size - chunk * CHUNK_BYTES)


class BundleIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds. ``part_bytes``: no part is longer; 0: there is one part. ``created_at_s`` is Unix time.

    ``exporter_name`` is what the exporter calls itself. ``blobs``: every blob of every model, each once.
    """

    version: int
    exporter: PeerId
    exporter_name: Annotated[str, msgspec.Meta(max_length=MAX_PEER_NAME)]
    created_at_s: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    part_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    models: Annotated[tuple[BundleModel, ...], msgspec.Meta(min_length=1, max_length=MAX_MODELS)]
    blobs: Annotated[tuple[BundleBlob, ...], msgspec.Meta(max_length=MAX_BLOBS)]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signer: str
    payload: bytes
    signature: bytes


class Header(msgspec.Struct, frozen=True):
    """What a part says of itself. ``part`` counts from 1; ``bundle`` is the id, 32 bytes."""

    part: int
    parts: int
    envelope_bytes: int
    bundle: bytes


class Piece(msgspec.Struct, frozen=True):
    """A blob's map and chunks in one part: of the ``carried`` ones those from ``first`` up to before ``last``.

    ``offset``: where the map begins in the part; the chunks follow it.
    """

    blob: BundleBlob
    offset: int
    first: int
    last: int

    @property
    def chunks_offset(self) -> int:
        """Where the first chunk begins in the part."""
        return self.offset + self.blob.map_bytes

    @property
    def end(self) -> int:
        """Where the piece ends in the part."""
        return self.chunks_offset + _span(self.blob, self.first, self.last)


class Part(msgspec.Struct, frozen=True):
    """One file of a bundle: ``size`` in bytes, ``number`` from 1."""

    number: int
    size: int
    pieces: tuple[Piece, ...]


# --- the index -------------------------------------------------------------------------------------------------------


def seal_index(index: BundleIndex, sign_bytes: Callable[[bytes], bytes]) -> bytes:
    """The signed index as it stands in every part. Raises InvalidRequest when there is too much for one bundle."""
    if len(index.models) > MAX_MODELS or len(index.blobs) > MAX_BLOBS:
        raise InvalidRequest(f"a bundle holds {MAX_MODELS} models with {MAX_BLOBS} blobs at most: export fewer at once")
    signed = sign(BUNDLE_DOMAIN, index, index.exporter, sign_bytes)
    if len(signed.payload) > MAX_INDEX_BYTES:
        raise InvalidRequest(
            f"the manifests and records of these models have {format_bytes(len(signed.payload))}, and a bundle's index "
            f"at most {format_bytes(MAX_INDEX_BYTES)}: export fewer at once"
        )
    return canonical(_Envelope(signed.signer, signed.payload, signed.signature))


def open_index(envelope: bytes) -> BundleIndex:
    """The index inside, if its exporter signed it and it is sound. Raises ManifestInvalid."""
    if len(envelope) > MAX_INDEX_BYTES + _ENVELOPE_FIELDS_BYTES:
        raise ManifestInvalid("the index of the bundle is too long")
    word = decode_canonical(envelope, _Envelope)
    signed = Signed(PeerId(word.signer), word.payload, word.signature)
    index = verify(BUNDLE_DOMAIN, signed, BundleIndex, MAX_INDEX_BYTES)
    if index.version != VERSION:
        raise ManifestInvalid(f"the bundle has version {index.version}; this version of meshmax reads {VERSION}")
    if index.exporter != signed.signer:
        raise ManifestInvalid("the bundle is signed by somebody else than its exporter")
    _check(index)
    return index


def manifests_of(index: BundleIndex) -> list[Manifest]:
    """The manifest of each model, in order. Raises ManifestInvalid."""
    return [parse_manifest(model.manifest) for model in index.models]


def _check(index: BundleIndex) -> None:
    blobs = {blob.sha256: blob for blob in index.blobs}
    if len(blobs) != len(index.blobs):
        raise ManifestInvalid("the bundle's index names a blob twice")
    for blob in index.blobs:
        if blob.map_bytes > max_map_bytes(blob.size):
            raise ManifestInvalid(f"the bundle's index gives blob {blob.sha256[:12]} a chunk map that is too long")
        if blob.chunks is not None and not _fits(blob.chunks, blob.count):
            raise ManifestInvalid(f"the bundle's index does not say which chunks of blob {blob.sha256[:12]} it has")
    for model, manifest in zip(index.models, manifests_of(index), strict=True):
        try:
            parse_name(model.name)
        except InvalidName as error:
            raise ManifestInvalid(error.message) from None
        for layer in manifest.blobs:
            if layer.digest not in blobs or blobs[layer.digest].size != layer.size:
                raise ManifestInvalid(f"the bundle's index does not describe blob {layer.digest[:12]} of {model.name}")


def _fits(bits: bytes, count: int) -> bool:
    return len(bits) == -(-count // 8) and int.from_bytes(bits, "little") >> count == 0


# --- parts -----------------------------------------------------------------------------------------------------------


def bundle_id(envelope: bytes) -> bytes:
    """The id of the bundle with this signed index."""
    return blake3(envelope).digest()


def encode_header(number: int, parts: int, envelope: bytes) -> bytes:
    """The header of part ``number``."""
    return _HEADER.pack(MAGIC, VERSION, 0, number, parts, len(envelope), bundle_id(envelope))


def decode_header(data: bytes) -> Header:
    """What the first HEADER_BYTES of a part say. Raises ManifestInvalid for what is no bundle, or one of another version."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise ManifestInvalid("this is not a bundle of meshmax")
    _, version, zero, part, parts, envelope_bytes, bundle = _HEADER.unpack(data[:HEADER_BYTES])
    if version != VERSION:
        raise ManifestInvalid(f"the bundle has version {version}; this version of meshmax reads {VERSION}")
    if zero or not 1 <= part <= parts <= MAX_PARTS or envelope_bytes > MAX_INDEX_BYTES + _ENVELOPE_FIELDS_BYTES:
        raise ManifestInvalid("the header of the bundle is damaged")
    return Header(part, parts, envelope_bytes, bundle)


def lay_out(index: BundleIndex, envelope_bytes: int) -> tuple[Part, ...]:
    """Where everything lies. Raises InvalidRequest when parts of this size cannot hold it; says which would."""
    start = HEADER_BYTES + envelope_bytes
    longest_map = max((blob.map_bytes for blob in index.blobs), default=0)
    packer = _Packer(start, index.part_bytes or NO_LIMIT, start + longest_map + CHUNK_BYTES)
    for blob in index.blobs:
        if blob.carried.total or not blob.size:
            packer.add(blob)
    packer.close()
    return tuple(packer.parts)


class _Packer:
    """Fills one part after the other, to ``room`` bytes at most."""

    def __init__(self, start: int, room: int, least: int) -> None:
        self.parts: list[Part] = []
        self._start, self._room, self._least = start, room, least
        self._at, self._pieces = start, list[Piece]()
        if start > room:
            raise self._too_small()

    def add(self, blob: BundleBlob) -> None:
        done, total = 0, blob.carried.total
        while True:
            room = self._room - self._at - blob.map_bytes
            last = _how_far(blob, done, total, room)
            if last > done or (last == total and room >= 0):
                piece = Piece(blob, self._at, done, last)
                self._pieces.append(piece)
                self._at, done = piece.end, last
                if done == total:
                    return
            elif self._at == self._start:
                raise self._too_small()
            self.close()

    def close(self) -> None:
        if self._pieces or not self.parts:
            self.parts.append(Part(len(self.parts) + 1, self._at, tuple(self._pieces)))
            self._pieces, self._at = [], self._start
        if len(self.parts) > MAX_PARTS:
            raise InvalidRequest(f"that would be more than {MAX_PARTS} parts: choose larger ones")

    def _too_small(self) -> InvalidRequest:
        return InvalidRequest(
            f"parts of {self._room} bytes are too small for this bundle: they need {self._least} bytes at least"
        )


def chunks_of(piece: Piece) -> Iterator[int]:
    """The indexes of a piece's chunks in its blob, ascending."""
    carried = piece.blob.carried
    if piece.blob.chunks is None:
        yield from range(piece.first, piece.last)
        return
    found = (index for index in range(carried.count) if index in carried)
    yield from islice(found, piece.first, piece.last)


def _how_far(blob: BundleBlob, first: int, total: int, room: int) -> int:
    """Up to before which of the carried chunks, from ``first`` on, ``room`` bytes suffice."""
    last = first + min(max(0, room) // CHUNK_BYTES, total - first)
    if last == total - 1 and room >= 0 and _span(blob, first, total) <= room:
        return total
    return last


def _span(blob: BundleBlob, first: int, last: int) -> int:
    """Bytes of the carried chunks from ``first`` up to before ``last``; the blob's very last chunk may be short."""
    if first >= last:
        return 0
    total = blob.carried.total
    has_end = last == total and (blob.count - 1) in blob.carried
    return (last - first) * CHUNK_BYTES - (CHUNK_BYTES - blob.length(blob.count - 1) if has_end else 0)


# --- names of files --------------------------------------------------------------------------------------------------


def stem_of(names: list[str]) -> str:
    """How the files of a bundle with these models begin: letters that every file system takes."""
    first = parse_name(names[0])
    more = f"-and-{len(names) - 1}-more" if len(names) > 1 else ""
    return _UNSAFE.sub("-", f"{first.model}-{first.tag}")[:_STEM_LENGTH] + more


def part_name(stem: str, number: int, parts: int) -> str:
    """The file name of a part: they sort, and each says n of m."""
    return f"{stem}{SUFFIX}" if parts == 1 else f"{stem}.{number:04d}-of-{parts:04d}{SUFFIX}"


def split_part_name(name: str) -> tuple[str, int, int] | None:
    """(stem, number, parts) of a part's name; None for another name, or that of a bundle's only file."""
    match = _PART_NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None
