"""Chunk maps: how a blob's shape is made, encoded, addressed and checked.

The encoding is canonical CBOR of {version, size, chunk_bytes, sha256, blake3, hashes}; a map's address is the BLAKE3 of
the whole encoding, so that size and whole-blob digests are as fixed by it as the chunks are. Decided here: which maps
are valid (1 MiB chunks, one hash a chunk, bounded size, canonical form) and whether a chunk is the one that a map
names. Hashing is pure computation; files are the store's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import msgspec
from blake3 import blake3

from meshmax.base.errors import ChunkMismatch, InvalidRequest, ManifestInvalid
from meshmax.base.ids import MapAddress, Sha256, parse_sha256
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, ChunkMap
from meshmax.wire.signed import canonical, decode_canonical

VERSION: Final = 1
HASH_BYTES: Final = 32
MAX_MAP_BYTES: Final = MAX_BLOB_BYTES // CHUNK_BYTES * HASH_BYTES + 256  # hashes of the largest blob, and the fields


class _Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    size: int
    chunk_bytes: int
    sha256: bytes
    blake3: bytes
    hashes: bytes


def encode_map(chunk_map: ChunkMap) -> bytes:
    """The canonical encoding of ``chunk_map``, at most MAX_MAP_BYTES. Raises ManifestInvalid for a map that is not valid."""
    _check(chunk_map)
    digest = bytes.fromhex(chunk_map.sha256)
    word = _Encoding(VERSION, chunk_map.size, chunk_map.chunk_bytes, digest, chunk_map.blake3, chunk_map.hashes)
    return canonical(word)


def decode_map(encoding: bytes) -> ChunkMap:
    """The chunk map in ``encoding``. Raises ManifestInvalid: too long, malformed, not canonical, or not a valid map."""
    if len(encoding) > MAX_MAP_BYTES:
        raise ManifestInvalid(f"a chunk map of {len(encoding)} bytes is over the limit of {MAX_MAP_BYTES}")
    word = decode_canonical(encoding, _Encoding)
    if word.version != VERSION:
        raise ManifestInvalid(f"a chunk map has version {word.version}; this version of meshmax reads {VERSION}")
    if len(word.sha256) != HASH_BYTES:
        raise ManifestInvalid("the sha256 in a chunk map does not have 32 bytes")
    chunk_map = ChunkMap(Sha256(word.sha256.hex()), word.size, word.blake3, word.hashes, word.chunk_bytes)
    _check(chunk_map)
    return chunk_map


def map_address(encoding: bytes) -> MapAddress:
    """The address of the chunk map whose encoding this is: BLAKE3, 64 hexadecimal digits."""
    return MapAddress(blake3(encoding).hexdigest())


def chunk_map_of(sha256: Sha256, size: int, whole: bytes, chunk_hashes: Sequence[bytes]) -> ChunkMap:
    """The map of a blob from its digests. ``whole`` is its BLAKE3. Raises ManifestInvalid if they do not fit together."""
    chunk_map = ChunkMap(sha256, size, whole, b"".join(chunk_hashes))
    _check(chunk_map)
    return chunk_map


def chunk_map_of_bytes(data: bytes) -> ChunkMap:
    """The map of a blob that is in memory."""
    hasher = BlobHasher()
    for offset in range(0, len(data), CHUNK_BYTES):
        hasher.update(data[offset : offset + CHUNK_BYTES])
    return hasher.chunk_map()


def check_chunk(chunk_map: ChunkMap, index: int, data: bytes | bytearray | memoryview) -> None:
    """Raise ChunkMismatch unless ``data`` is chunk ``index`` of the blob."""
    length = len(data)
    if not 0 <= index < chunk_map.count:
        raise ChunkMismatch(f"there is no chunk {index}: the blob has {chunk_map.count}")
    if length != chunk_map.span(index)[1]:
        raise ChunkMismatch(f"chunk {index} has {length} bytes, not {chunk_map.span(index)[1]}")
    if blake3(data).digest() != chunk_map.chunk_hash(index):
        raise ChunkMismatch(f"chunk {index} does not match its hash")


class BlobHasher:
    """All digests of a blob in one pass. Each update is one chunk: CHUNK_BYTES long, the last one shorter."""

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._whole = blake3()
        self._hashes = bytearray()

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next chunk, which is not kept."""
        self._sha256.update(chunk)
        self._whole.update(chunk)
        self._hashes += blake3(chunk).digest()
        self.size += len(chunk)

    def chunk_map(self) -> ChunkMap:
        """The map of everything so far."""
        digest = Sha256(self._sha256.hexdigest())
        return chunk_map_of(digest, self.size, self._whole.digest(), [bytes(self._hashes)])


def _check(chunk_map: ChunkMap) -> None:
    try:
        parse_sha256(chunk_map.sha256)
    except InvalidRequest as error:
        raise ManifestInvalid(error.message) from None
    if not 0 <= chunk_map.size <= MAX_BLOB_BYTES:
        raise ManifestInvalid(f"a chunk map is of a blob of {chunk_map.size} bytes; at most {MAX_BLOB_BYTES} are taken")
    if chunk_map.chunk_bytes != CHUNK_BYTES:
        raise ManifestInvalid(f"a chunk map has chunks of {chunk_map.chunk_bytes} bytes; only {CHUNK_BYTES} are taken")
    if len(chunk_map.blake3) != HASH_BYTES or len(chunk_map.hashes) != HASH_BYTES * chunk_map.count:
        raise ManifestInvalid(f"a chunk map of {chunk_map.count} chunks does not have one hash a chunk")
