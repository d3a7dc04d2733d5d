"""Messages of ``/meshmax/model/1.0.0``: what a model is (record, manifest), its chunk maps, and how it describes itself.

The asker sends one request a stream and ends its side; the server answers and ends its own. GetModel: a RecordReply, then
a ManifestReply (two frames, since each may take half a frame). GetMap and GetBlobMap: MapParts in order until ``last``.
Describe: a DescribeReply, whose content is JSON, so that nothing but JSON's types comes out of it. Download: a
DownloadReply. Anything may be answered with a Failure. Decided here: bounds and shapes. Not here: whether what was sent
is what was asked (services.model_exchange).
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.catalog import ModelDescription
from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.model import CHUNK_BYTES, MAX_MANIFEST_BYTES, Signed
from meshmax.base.names import MAX_NAME
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import MAX_FRAME_BYTES, Codec

MAP_PART_BYTES: Final = 512 * KIB  # half a frame
MAX_REQUEST_BYTES: Final = 2 * KIB  # a name of MAX_NAME characters, a digest, and room for what later versions add
MAX_DESCRIPTION_BYTES: Final = MAX_FRAME_BYTES - KIB  # of JSON; its maker cuts long texts
MAX_TRANSFER_ID: Final = 64  # characters
_MAP_FIELDS_BYTES: Final = 256  # a map's encoding but for its hashes: five names, two numbers, two digests
_HASH_BYTES: Final = 32

Hex64 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]


class GetModel(msgspec.Struct, frozen=True, tag="get_model"):
    """The model whose manifest has this ``digest``, or else the one that the server calls ``name``."""

    digest: Hex64 | None = None
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""


class GetMap(msgspec.Struct, frozen=True, tag="get_map"):
    """The chunk map at ``address``."""

    address: Hex64


class GetBlobMap(msgspec.Struct, frozen=True, tag="get_blob_map"):
    """The chunk map by which the server serves the whole blob ``digest``: for who knows no more of it than its sha256."""

    digest: Hex64


class Download(msgspec.Struct, frozen=True, tag="download"):
    """Please pull the model whose manifest has this ``digest``, and call it ``name``. The server decides."""

    digest: Hex64
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """What the model whose manifest has this ``digest`` says of itself."""

    digest: Hex64


class RecordReply(msgspec.Struct, frozen=True, tag="record"):
    """The publisher's signed record of the model, if the server has one."""

    record: Signed | None = None


class ManifestReply(msgspec.Struct, frozen=True, tag="manifest"):
    """The manifest's very bytes."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]


class MapPart(msgspec.Struct, frozen=True, tag="map"):
    """The next bytes of a chunk map's encoding."""

    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAP_PART_BYTES)]
    last: bool


class DescribeReply(msgspec.Struct, frozen=True, tag="description"):
    """A ModelDescription in JSON."""

    description: Annotated[bytes, msgspec.Meta(max_length=MAX_DESCRIPTION_BYTES)]


class DownloadReply(msgspec.Struct, frozen=True, tag="downloading"):
    """The server pulls it; ``transfer_id`` is what it calls the transfer."""

    transfer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TRANSFER_ID)]


FromAsker: TypeAlias = GetModel | GetMap | GetBlobMap | Describe | Download
FromHolder: TypeAlias = RecordReply | ManifestReply | MapPart | DescribeReply | DownloadReply | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(FromAsker, MAX_REQUEST_BYTES)
FROM_HOLDER: Final[Codec[FromHolder]] = Codec(FromHolder)

_description: Final = msgspec.json.Decoder(ModelDescription)


def max_map_bytes(blob_size: int) -> int:
    """How long the encoding of the chunk map of a blob of ``blob_size`` bytes can be."""
    return -(-blob_size // CHUNK_BYTES) * _HASH_BYTES + _MAP_FIELDS_BYTES


def describe_reply(description: ModelDescription) -> DescribeReply:
    """``description`` as a message. Raises LocalProtocolError if it is too long."""
    encoded = msgspec.json.encode(description)
    if len(encoded) > MAX_DESCRIPTION_BYTES:
        raise LocalProtocolError("the description of the model is too long for a message")
    return DescribeReply(encoded)


def description_of(reply: DescribeReply) -> ModelDescription:
    """The description in a reply. Raises RemoteProtocolError."""
    try:
        return _description.decode(reply.description)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the peer's description of the model is not valid: {str(error)[:200]}") from None
