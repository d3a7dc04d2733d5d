"""Messages of ``/meshmax/blob/1.0.0``: the chunks of one blob, on one stream, asked ahead.

The fetcher says Open; the server answers with Have (or a Failure, and the stream ends). From then on the fetcher sends
Want and Cancel, at most MAX_WANTS wants unanswered; the server answers each Want with one last word: the chunk in
ChunkParts in order without gaps, Busy, NotHave, or Cancelled. Chunks are sent one after the other, never mixed. Have and
Gained may come between any two other messages: a later Have replaces the one before, Gained adds to it. Decided here:
bounds, and what a valid sequence of parts is. Not here: whether a chunk is the right one (wire.chunkmap).
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, ChunkMap, Haves
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

PART_BYTES: Final = 256 * KIB  # of one ChunkPart: what a stream's window holds, so that a Cancel takes effect soon
MAX_WANTS: Final = 128  # unanswered wants a stream; twice the largest window, since cancelled ones count until answered
MAX_GAINED: Final = 256  # chunks in one Gained; beyond, a Have is not much longer
MAX_CHUNKS: Final = MAX_BLOB_BYTES // CHUNK_BYTES
MAX_REQUEST_BYTES: Final = KIB  # of a fetcher's message: a digest or an index, and room for what later versions add
MAX_BUSY_S: Final = 3600.0

Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Fetcher: this stream is about the blob ``digest``, 64 hexadecimal digits."""

    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]


class Want(msgspec.Struct, frozen=True, tag="want"):
    """Fetcher: send chunk ``index``."""

    index: Index


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Fetcher: chunk ``index`` is no longer wanted."""

    index: Index


class Have(msgspec.Struct, frozen=True, tag="have"):
    """Server: of ``count`` chunks, those in ``bits`` (least significant bit first) are here."""

    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNKS)]
    bits: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNKS // 8)]


class Gained(msgspec.Struct, frozen=True, tag="gained"):
    """Server: chunks ``indexes`` are here now too. What a growing blob says at once, some bytes a chunk."""

    indexes: Annotated[tuple[Index, ...], msgspec.Meta(min_length=1, max_length=MAX_GAINED)]


class ChunkPart(msgspec.Struct, frozen=True, tag="part"):
    """Server: bytes of chunk ``index`` from ``offset`` in the chunk on."""

    index: Index
    offset: Annotated[int, msgspec.Meta(ge=0, lt=CHUNK_BYTES)]
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=PART_BYTES)]


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """Server: not chunk ``index`` now; ask again in ``retry_after_s``. Other chunks may be asked for meanwhile.

    Said above all of a chunk that is on its way to another fetcher, who will have it to give (core.offer).
    """

    index: Index
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_BUSY_S)]


class NotHave(msgspec.Struct, frozen=True, tag="not_have"):
    """Server: chunk ``index`` is not here, or no longer good."""

    index: Index


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """Server: as asked, no more of chunk ``index`` will come."""

    index: Index


FromFetcher: TypeAlias = Open | Want | Cancel
FromServer: TypeAlias = Have | Gained | ChunkPart | Busy | NotHave | Cancelled | Failure

FROM_FETCHER: Final[Codec[FromFetcher]] = Codec(FromFetcher, MAX_REQUEST_BYTES)
FROM_SERVER: Final[Codec[FromServer]] = Codec(FromServer)


def open_blob(digest: Sha256) -> Open:
    """The first message of a fetcher."""
    return Open(digest)


def have_of(haves: Haves) -> Have:
    """``haves`` as a message."""
    return Have(haves.count, haves.bits)


def haves_of(have: Have, chunk_map: ChunkMap) -> Haves:
    """What a server's Have says about the blob of ``chunk_map``. Raises RemoteProtocolError if it is about another shape."""
    if have.count != chunk_map.count:
        raise RemoteProtocolError(f"the peer has a blob of {have.count} chunks; this one has {chunk_map.count}")
    if len(have.bits) != -(-have.count // 8) or int.from_bytes(have.bits, "little") >> have.count:
        raise RemoteProtocolError("the peer's list of chunks does not fit the blob")
    return Haves(have.count, have.bits)


def news_of(before: Haves, now: Haves) -> Have | Gained | None:
    """What to say to one who knows ``before``; None if that is all there is."""
    old, new = int.from_bytes(before.bits, "little"), int.from_bytes(now.bits, "little")
    gained = new & ~old
    if old == new:
        return None
    if old & ~new or gained.bit_count() > MAX_GAINED:
        return have_of(now)
    indexes = []
    while gained:
        indexes.append((gained & -gained).bit_length() - 1)
        gained &= gained - 1
    return Gained(tuple(indexes))


def haves_with(before: Haves, gained: Gained) -> Haves:
    """``before`` and what was gained. Raises RemoteProtocolError if the blob has no such chunks."""
    bits = bytearray(before.bits)
    for index in gained.indexes:
        if index >= before.count:
            raise RemoteProtocolError(f"the peer says it has chunk {index} of a blob of {before.count} chunks")
        bits[index >> 3] |= 1 << (index & 7)
    return Haves(before.count, bytes(bits))


class Assembly:
    """Puts a server's ChunkParts together; holds at most one chunk."""

    def __init__(self, chunk_map: ChunkMap) -> None:
        self._map = chunk_map
        self._index: int | None = None
        self._parts: list[bytes] = []
        self._held_bytes = 0

    def add(self, part: ChunkPart) -> bytes | None:
        """The whole chunk if ``part`` was its last, else None. Raises RemoteProtocolError for a part out of order."""
        if self._index is None:
            self._index = part.index
        if part.index != self._index or part.offset != self._held_bytes or part.index >= self._map.count:
            raise RemoteProtocolError(f"the peer sent a part of chunk {part.index} out of order")
        length = self._map.span(part.index)[1]
        self._held_bytes += len(part.data)
        if self._held_bytes > length:
            raise RemoteProtocolError(f"the peer sent more of chunk {part.index} than it has")
        self._parts.append(part.data)
        if self._held_bytes < length:
            return None
        chunk = b"".join(self._parts)
        self._clear()
        return chunk

    def drop(self, index: int) -> int:
        """No more of chunk ``index`` will come: how many bytes of it had come."""
        if index != self._index:
            return 0
        held_bytes = self._held_bytes
        self._clear()
        return held_bytes

    def _clear(self) -> None:
        self._index, self._parts, self._held_bytes = None, [], 0
