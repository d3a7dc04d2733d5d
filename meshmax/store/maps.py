"""Maps and seals: what is known of each blob. A map says what its bytes must be; a seal says when they last were so.

A seal is the size and the time stamp (nanoseconds) that a blob's file had when every chunk was known to be right, and
whether its sha256 was computed too. A blob whose file differs from its seal, or that has a map and no seal, is in doubt
and is verified before use. A blob with neither is an adopted one, taken as Ollama takes it until its map is made.
Blocking; called through RunSync.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import ChunkMap
from meshmax.store.disk import Disk, try_read
from meshmax.store.layout import Layout
from meshmax.wire.chunkmap import MAX_MAP_BYTES, decode_map, encode_map, map_address

CACHED_MAPS: Final = 64  # of 32 bytes a MiB: a 40 GB blob's map has 1.3 MB
MAX_SEAL_BYTES: Final = 1024


class Seal(msgspec.Struct, frozen=True):
    """``size`` in bytes, ``mtime_ns`` as in stat, ``proved``: the sha256 was computed from the very bytes."""

    size: int
    mtime_ns: int
    proved: bool


class MapFiles:
    """Chunk maps and seals on disk, the last maps used also in memory."""

    def __init__(self, layout: Layout, disk: Disk) -> None:
        self._layout = layout
        self._disk = disk
        self._addresses = layout.known_maps()
        self._cache: OrderedDict[Sha256, ChunkMap] = OrderedDict()
        self._lock = threading.RLock()  # calls come from several threads; held for a small file's read or write at most

    def save(self, chunk_map: ChunkMap) -> MapAddress:
        """Store a map, in place of an older one of the same blob."""
        with self._lock:
            encoding = encode_map(chunk_map)
            address = map_address(encoding)
            old = self._addresses.get(chunk_map.sha256)
            if old != address or not self._layout.map(chunk_map.sha256, address).exists():
                self._disk.write_whole(self._layout.map(chunk_map.sha256, address), encoding)
                self._addresses[chunk_map.sha256] = address
            if old not in (None, address):
                self._disk.unlink(self._layout.map(chunk_map.sha256, MapAddress(str(old))))
            self._remember(chunk_map)
            return address

    def load(self, digest: Sha256) -> ChunkMap | None:
        """The map of a blob; a damaged file counts as none and is removed."""
        with self._lock:
            if digest in self._cache:
                self._cache.move_to_end(digest)
                return self._cache[digest]
            address = self._addresses.get(digest)
            encoding = self.read(address) if address else None
            if encoding is None:
                return None
            chunk_map = decode_map(encoding)
            self._remember(chunk_map)
            return chunk_map

    def address(self, digest: Sha256) -> MapAddress | None:
        """The address of a blob's map, if there is one."""
        return self._addresses.get(digest)

    def read(self, address: MapAddress) -> bytes | None:
        """The encoding of the map at ``address``, checked against it."""
        with self._lock:
            digest = next((d for d, known in self._addresses.items() if known == address), None)
            if digest is None:
                return None
            encoding = try_read(self._layout.map(digest, address), MAX_MAP_BYTES)
            try:
                if encoding is not None and map_address(encoding) == address and decode_map(encoding).sha256 == digest:
                    return encoding
            except ManifestInvalid:
                pass
            self.forget(digest)
            return None

    def forget(self, digest: Sha256) -> None:
        """Remove map and seal of a blob."""
        with self._lock:
            self.unseal(digest)
            self._cache.pop(digest, None)
            address = self._addresses.pop(digest, None)
            if address is not None:
                self._disk.unlink(self._layout.map(digest, address))

    def seal(self, digest: Sha256, path: Path, proved: bool) -> None:
        """Note that ``path`` holds the whole blob as it is now (it may be renamed afterwards)."""
        stat = os.stat(path)
        data = msgspec.json.encode(Seal(stat.st_size, stat.st_mtime_ns, proved))
        self._disk.write_whole(self._layout.seal(digest), data)

    def unseal(self, digest: Sha256) -> None:
        """The blob is in doubt from now on."""
        self._disk.unlink(self._layout.seal(digest))

    def try_seal(self, digest: Sha256) -> Seal | None:
        """The seal of a blob, or None."""
        data = try_read(self._layout.seal(digest), MAX_SEAL_BYTES)
        try:
            return msgspec.json.decode(data, type=Seal) if data else None
        except (msgspec.DecodeError, ValueError):
            return None

    def in_doubt(self, digest: Sha256, path: Path) -> bool:
        """Whether the blob at ``path`` has to be verified before use. Raises FileNotFoundError."""
        stat = os.stat(path)
        seal = self.try_seal(digest)
        if seal is None:
            return digest in self._addresses
        return (seal.size, seal.mtime_ns) != (stat.st_size, stat.st_mtime_ns)

    def _remember(self, chunk_map: ChunkMap) -> None:
        self._cache[chunk_map.sha256] = chunk_map
        self._cache.move_to_end(chunk_map.sha256)
        while len(self._cache) > CACHED_MAPS:
            self._cache.popitem(last=False)
