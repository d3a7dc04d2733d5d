"""The model protocol's messages: what is taken, and that nothing else is."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from meshmax.base.catalog import ModelDescription
from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import MAX_MANIFEST_BYTES, ModelDetails, Signed
from meshmax.wire import model
from meshmax.wire.chunkmap import chunk_map_of_bytes, encode_map
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES, Codec
from meshmax.wire.signed import MAX_PAYLOAD_BYTES

DIGEST = "ab" * 32
SIGNED = Signed(PeerId("12D3KooW"), b"payload", bytes(64))

ASKER: list[model.FromAsker] = [
    model.GetModel(DIGEST),
    model.GetModel(name="small:latest"),
    model.GetMap(DIGEST),
    model.GetBlobMap(DIGEST),
    model.Describe(DIGEST),
    model.Download(DIGEST, "small:latest"),
]
HOLDER: list[model.FromHolder] = [
    model.RecordReply(SIGNED),
    model.RecordReply(),
    model.ManifestReply(b'{"schemaVersion":2}'),
    model.MapPart(b"xyz", last=True),
    model.DescribeReply(b'{"digest":"x"}'),
    model.DownloadReply("ab-1"),
    Failure("model_not_found", "not here"),
]
ALL = [(model.FROM_ASKER, m) for m in ASKER] + [(model.FROM_HOLDER, m) for m in HOLDER]


def test_the_bytes_of_messages_are_fixed() -> None:
    assert model.FROM_HOLDER.encode(model.MapPart(b"x", last=True))[HEADER_BYTES:].hex() == (
        "83a474797065a36d6170a464617461c40178a46c617374c3"
    )
    assert model.FROM_ASKER.encode(model.GetModel(name="n"))[HEADER_BYTES:].hex() == (
        "83a474797065a96765745f6d6f64656ca6646967657374c0a46e616d65a16e"
    )


@pytest.mark.parametrize(("codec", "message"), ALL)
def test_a_message_arrives_as_it_was_sent(codec: Codec[object], message: object) -> None:
    assert codec.decode(codec.encode(message)[HEADER_BYTES:]) == message


@pytest.mark.parametrize(("codec", "message"), ALL)
def test_every_truncation_and_bit_flip_is_another_valid_message_or_a_protocol_error(
    codec: Codec[object], message: object
) -> None:
    body = codec.encode(message)[HEADER_BYTES:]
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            codec.decode(body[:length])
    for at in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[at >> 3] ^= 1 << (at & 7)
        with contextlib.suppress(RemoteProtocolError):
            assert codec.decode(flipped) is not None


@pytest.mark.parametrize(
    "message",
    [
        model.GetModel("AB" * 32),
        model.GetModel(name="x" * 1000),
        model.GetMap("../" * 21 + "x"),
        model.Describe(""),
        model.ManifestReply(bytes(MAX_MANIFEST_BYTES + 1)),
        model.MapPart(b"", last=False),
        model.MapPart(bytes(model.MAP_PART_BYTES + 1), last=False),
    ],
)
def test_what_is_out_of_bounds_is_a_protocol_error(message: model.FromAsker | model.FromHolder) -> None:
    codec: Any = model.FROM_ASKER if isinstance(message, model.FromAsker) else model.FROM_HOLDER
    with pytest.raises(RemoteProtocolError):
        codec.decode(codec.encode(message)[HEADER_BYTES:])


def test_the_largest_record_and_manifest_each_fit_a_frame() -> None:
    record = model.RecordReply(Signed(PeerId("1" * 52), bytes(MAX_PAYLOAD_BYTES), bytes(64)))
    for message in (record, model.ManifestReply(bytes(MAX_MANIFEST_BYTES))):
        assert model.FROM_HOLDER.decode(model.FROM_HOLDER.encode(message)[HEADER_BYTES:]) == message


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1, 40 << 20])
def test_a_maps_encoding_is_within_the_bound_that_its_blobs_size_gives(size: int) -> None:
    encoding = encode_map(chunk_map_of_bytes(bytes(size)))
    assert len(encoding) <= model.max_map_bytes(size) <= len(encoding) + 256


def test_a_description_crosses_as_it_is_and_only_json_comes_out() -> None:
    description = ModelDescription(Sha256(DIGEST), ModelDetails(family="llama"), {"a.b": [1, 2.5, "x", None, True]})
    assert model.description_of(model.describe_reply(description)) == description
    for garbage in (b"", b"{", b"[]", b'{"digest":5}', b"[" * 5000, b"\xff\xfe"):
        with pytest.raises(RemoteProtocolError):
            model.description_of(model.DescribeReply(garbage))


def test_a_description_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError):
        model.describe_reply(ModelDescription(Sha256(DIGEST), ModelDetails(), template="x" * (1 << 20)))
