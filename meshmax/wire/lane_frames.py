"""A lane's frames, sealed and opened in place in one reused buffer.

On the wire a frame is its length (4 bytes, big-endian, authenticated as associated data) and an AEAD ciphertext of a
48-byte header and a body. The nonce is the frame's number in its direction, never sent: a frame that was changed,
repeated, moved or left out does not open, and a stream cut short lacks its End. Frame 0 of each direction is the proof of
the key (Hello, Welcome); the fetcher's is preceded by the lane's id. Rules: lengths are checked before anything is read;
a direction has at most MAX_FRAMES frames, then the lane ends and another is made (no rekeying); after an error neither
a Sealer nor an Opener is used again. Not here: keys (wire.lane), sockets (net.lane_socket), chunk hashes (wire.chunkmap).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.wire.blob import MAX_BUSY_S, MAX_CHUNKS
from meshmax.wire.lane import AES_128_GCM, LANE_ID_BYTES

MAX_INDEXES: Final = 64  # in one Want: a body of 256 bytes
# AES-GCM: 2^18 frames of 2^16 blocks are 2^34 blocks under one key, the margin of TLS 1.3 (RFC 8446 section 5.5) and
# 256 GiB of chunks.
MAX_FRAMES: Final = 1 << 18

LENGTH_BYTES: Final = 4
TAG_BYTES: Final = 16
HEADER_BYTES: Final = 48
FIRST_BYTES: Final = LENGTH_BYTES + HEADER_BYTES + TAG_BYTES  # the shortest frame, which every frame is at least
HELLO_BYTES: Final = LANE_ID_BYTES + FIRST_BYTES

_HEADER: Final = struct.Struct(">B3xII4x32s")  # kind, index, detail, digest
_BODY_AT: Final = LENGTH_BYTES + HEADER_BYTES
_NO_DIGEST: Final = bytes(32)


class Kind(enum.IntEnum):
    """What a frame says. ``detail`` is milliseconds in Busy, the count of indexes in Want, else 0."""

    HELLO = 1  # fetcher: I have the key
    WELCOME = 2  # server: so have I
    WANT = 3  # fetcher: send the chunks whose indexes are in the body, 4 bytes each, big-endian
    CANCEL = 4  # fetcher: chunk `index` is no longer wanted
    END = 5  # either: in order, nothing follows
    CHUNK = 6  # server: the body is chunk `index`
    LACKING = 7  # server: chunk `index` is not here
    BUSY = 8  # server: not chunk `index` now
    CANCELLED = 9  # server: as asked, chunk `index` does not come


_FROM_FETCHER: Final = frozenset({Kind.HELLO, Kind.WANT, Kind.CANCEL, Kind.END})
_FROM_SERVER: Final = frozenset({Kind.WELCOME, Kind.CHUNK, Kind.LACKING, Kind.BUSY, Kind.CANCELLED, Kind.END})
_WITH_BODY: Final = frozenset({Kind.WANT, Kind.CHUNK})


class Frame(msgspec.Struct):
    """An opened frame. ``body`` is a view of the Opener's buffer, good until the next frame is read."""

    kind: Kind
    index: int
    detail: int
    digest: Sha256
    body: memoryview

    @property
    def indexes(self) -> tuple[int, ...]:
        """Of a Want."""
        return struct.unpack(f">{self.detail}I", self.body)

    @property
    def retry_after_s(self) -> float:
        """Of a Busy."""
        return self.detail / 1000


def _cipher(name: str, key: bytes) -> AESGCM | ChaCha20Poly1305:
    return AESGCM(key) if name == AES_128_GCM else ChaCha20Poly1305(key)


class Sealer:
    """Numbers and seals the frames of one direction. ``room`` is where a chunk's bytes are put before `seal_chunk`."""

    def __init__(self, cipher: str, key: bytes, max_body_bytes: int) -> None:
        self._cipher = _cipher(cipher, key)
        self._buffer = bytearray(_BODY_AT + max_body_bytes + TAG_BYTES)
        self._view = memoryview(self._buffer)
        self.room = self._view[_BODY_AT : _BODY_AT + max_body_bytes]
        self._number = 0

    @property
    def last(self) -> bool:
        """Only one more frame can be sealed, which is to be the End."""
        return self._number >= MAX_FRAMES - 1

    def seal(self, kind: Kind, index: int = 0, detail: int = 0, digest: Sha256 | None = None) -> memoryview:
        """A frame without a body; good until the next is sealed."""
        return self._seal(kind, index, detail, digest, 0)

    def seal_want(self, digest: Sha256, indexes: Sequence[int]) -> memoryview:
        """A Want for 1 to MAX_INDEXES chunks. Raises LocalProtocolError."""
        if not 1 <= len(indexes) <= MAX_INDEXES or not all(0 <= index < MAX_CHUNKS for index in indexes):
            raise LocalProtocolError(f"a want names 1 to {MAX_INDEXES} chunks of a blob")
        struct.pack_into(f">{len(indexes)}I", self._buffer, _BODY_AT, *indexes)
        return self._seal(Kind.WANT, 0, len(indexes), digest, 4 * len(indexes))

    def seal_chunk(self, digest: Sha256, index: int, size: int) -> memoryview:
        """A Chunk of the first ``size`` bytes in ``room``, which are overwritten. Raises LocalProtocolError."""
        if not 1 <= size <= len(self.room):
            raise LocalProtocolError(f"a chunk has 1 to {len(self.room)} bytes, not {size}")
        return self._seal(Kind.CHUNK, index, 0, digest, size)

    def seal_busy(self, digest: Sha256, index: int, retry_after_s: float) -> memoryview:
        """A Busy; the time is cut to 0 to MAX_BUSY_S."""
        return self._seal(Kind.BUSY, index, int(1000 * min(max(retry_after_s, 0.0), MAX_BUSY_S)), digest, 0)

    def _seal(self, kind: Kind, index: int, detail: int, digest: Sha256 | None, size: int) -> memoryview:
        number = self._number
        if number >= MAX_FRAMES:
            raise LocalProtocolError("the lane has used up its frame numbers")
        self._number = number + 1
        raw_digest = bytes.fromhex(digest) if digest is not None else _NO_DIGEST
        _HEADER.pack_into(self._buffer, LENGTH_BYTES, kind, index, detail, raw_digest)
        end = _BODY_AT + size
        frame = self._view[: end + TAG_BYTES]
        length = (end + TAG_BYTES - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")
        frame[:LENGTH_BYTES] = length
        # In place: one buffer of 1 MiB stays in the processor's cache where two would not.
        self._cipher.encrypt_into(number.to_bytes(12, "big"), frame[LENGTH_BYTES:end], length, frame[LENGTH_BYTES:])
        return frame


class Opener:
    """Checks and opens the frames of one direction: fill `first`, then `rest`, then `open`."""

    def __init__(self, cipher: str, key: bytes, from_fetcher: bool) -> None:
        """The fetcher's frames are at most MAX_INDEXES indexes long, the server's a chunk."""
        self._cipher = _cipher(cipher, key)
        self._kinds = _FROM_FETCHER if from_fetcher else _FROM_SERVER
        self._max_body = 4 * MAX_INDEXES if from_fetcher else CHUNK_BYTES
        self._view = memoryview(bytearray(_BODY_AT + self._max_body + TAG_BYTES))
        self.first = self._view[:FIRST_BYTES]
        self._number = 0

    def rest(self) -> memoryview:
        """What of the frame is still to be filled, perhaps nothing. Raises RemoteProtocolError for a length out of bounds."""
        length = int.from_bytes(self._view[:LENGTH_BYTES], "big")
        if not 0 <= length - HEADER_BYTES - TAG_BYTES <= self._max_body:
            raise RemoteProtocolError(f"the peer announced a frame of {length} bytes on a lane")
        return self._view[FIRST_BYTES : LENGTH_BYTES + length]

    def open(self) -> Frame:
        """The frame that was filled in. Raises RemoteProtocolError: not authentic, not the next one, or not valid."""
        if self._number >= MAX_FRAMES:
            raise RemoteProtocolError("the peer sent more frames than a lane has")
        length = self._view[:LENGTH_BYTES]
        end = LENGTH_BYTES + int.from_bytes(length, "big")
        sealed = self._view[LENGTH_BYTES:end]
        try:
            self._cipher.decrypt_into(self._number.to_bytes(12, "big"), sealed, length, sealed[:-TAG_BYTES])
        except InvalidTag:
            raise RemoteProtocolError("a frame on a lane is not authentic, or not the next one") from None
        self._number += 1
        return self._parsed(end - TAG_BYTES)

    def _parsed(self, end: int) -> Frame:
        kind_number, index, detail, digest = _HEADER.unpack_from(self._view, LENGTH_BYTES)
        body = self._view[_BODY_AT:end]
        try:
            kind = Kind(kind_number)
        except ValueError:
            raise RemoteProtocolError(f"the peer sent a frame of kind {kind_number} on a lane") from None
        if kind not in self._kinds or bool(body) != (kind in _WITH_BODY) or index >= MAX_CHUNKS:
            raise RemoteProtocolError(f"the peer sent a {kind.name} on a lane that is not valid")
        if kind is Kind.WANT and not (1 <= detail <= MAX_INDEXES and len(body) == 4 * detail):
            raise RemoteProtocolError("the peer sent a WANT on a lane that is not valid")
        frame = Frame(kind, index, detail, Sha256(digest.hex()), body)
        if kind is Kind.WANT and max(frame.indexes) >= MAX_CHUNKS:
            raise RemoteProtocolError("the peer wants a chunk that no blob has")
        return frame
