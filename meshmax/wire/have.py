"""Have lists: what a site has, as a text that people carry to another site, which then exports only what is lacking there.

JSON, so that it can be looked at, sent by mail and pasted: names with the digests of their manifests, digests of whole
blobs, and for partial blobs which chunks are there (bits in base64). Nothing in it is believed: a list that lies costs a
bundle that is too small or too large, and never a wrong byte. Not here: what is made of it (services.export).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from meshmax.base.errors import InvalidRequest
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, Haves
from meshmax.base.names import MAX_NAME
from meshmax.base.units import MIB
from meshmax.wire.model import Hex64

MAX_LIST_BYTES: Final = 16 * MIB
MAX_LISTED: Final = 100_000  # names, and blobs: of a mesh that is as large as they get
MAX_PARTIALS: Final = 4096
_MAX_BITS: Final = MAX_BLOB_BYTES // CHUNK_BYTES // 8


class HaveModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name and what it means there."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
    digest: Hex64


class HavePartial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A blob of which only some chunks are there: ``count`` in all, ``bits`` those that are."""

    digest: Hex64
    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES // CHUNK_BYTES)]
    bits: Annotated[bytes, msgspec.Meta(max_length=_MAX_BITS)]

    @property
    def haves(self) -> Haves:
        """The same as a bitmap; nothing where the bits do not fit the count."""
        if len(self.bits) != -(-self.count // 8) or int.from_bytes(self.bits, "little") >> self.count:
            return Haves.none(self.count)
        return Haves(self.count, self.bits)


class HaveList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the peer ``peer``, or its ``mesh``, has. ``listed_at_s`` is Unix time."""

    meshmax_have: Literal[1]
    peer: Annotated[str, msgspec.Meta(max_length=64)]
    listed_at_s: int
    mesh: bool
    models: Annotated[tuple[HaveModel, ...], msgspec.Meta(max_length=MAX_LISTED)]
    blobs: Annotated[tuple[Hex64, ...], msgspec.Meta(max_length=MAX_LISTED)]
    partials: Annotated[tuple[HavePartial, ...], msgspec.Meta(max_length=MAX_PARTIALS)] = ()


_decoder: Final = msgspec.json.Decoder(HaveList)


def encode_have(have: HaveList) -> bytes:
    """``have`` as compact JSON."""
    return msgspec.json.encode(have)


def decode_have(data: bytes) -> HaveList:
    """The list in ``data``. Raises InvalidRequest that says what is accepted."""
    if len(data) > MAX_LIST_BYTES:
        raise InvalidRequest(
            f"the list is longer than {MAX_LIST_BYTES >> 20} MiB: give what `meshmax have --list` wrote"
        )
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"this is no list of what a site has: give what `meshmax have --list` wrote there ({str(error)[:200]})"
        ) from None
