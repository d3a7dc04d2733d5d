"""The chunk protocol's messages: what is taken, and that nothing else is."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.core.fetch_source import MAX_WINDOW
from meshmax.wire import blob
from meshmax.wire.chunkmap import chunk_map_of_bytes
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES, Codec

DIGEST = Sha256("ab" * 32)
DATA = bytes(range(256)) * (CHUNK_BYTES // 256) + b"tail"
MAP = chunk_map_of_bytes(DATA)

FETCHER: list[blob.FromFetcher] = [blob.Open(DIGEST), blob.Want(0), blob.Want(blob.MAX_CHUNKS - 1), blob.Cancel(7)]
SERVER: list[blob.FromServer] = [
    blob.Have(10, b"\xff\x03"),
    blob.Gained((0, 9, blob.MAX_CHUNKS - 1)),
    blob.ChunkPart(3, 256, b"some bytes"),
    blob.Busy(1, 2.5),
    blob.NotHave(4),
    blob.Cancelled(4),
    Failure("blob_not_found", "not here"),
]


def test_the_bytes_of_messages_are_fixed() -> None:
    assert blob.FROM_FETCHER.encode(blob.Want(5)).hex() == "0000001282a474797065a477616e74a5696e64657805"
    assert blob.FROM_SERVER.encode(blob.Have(10, b"\xff\x03")).hex() == (
        "0000001b83a474797065a468617665a5636f756e740aa462697473c402ff03"
    )
    part = blob.FROM_SERVER.encode(blob.ChunkPart(1, 2, b"x"))
    assert part.hex() == "0000002284a474797065a470617274a5696e64657801a66f666673657402a464617461c40178"


@pytest.mark.parametrize("message", FETCHER)
def test_a_fetchers_message_arrives_as_it_was_sent(message: blob.FromFetcher) -> None:
    assert blob.FROM_FETCHER.decode(blob.FROM_FETCHER.encode(message)[HEADER_BYTES:]) == message


@pytest.mark.parametrize("message", SERVER)
def test_a_servers_message_arrives_as_it_was_sent(message: blob.FromServer) -> None:
    assert blob.FROM_SERVER.decode(blob.FROM_SERVER.encode(message)[HEADER_BYTES:]) == message


def _damaged(body: bytes) -> list[bytes]:
    cut = [body[:length] for length in range(len(body))]
    flipped = [
        bytes(byte ^ (1 << bit) if place == at else byte for place, byte in enumerate(body))
        for at in range(len(body))
        for bit in range(8)
    ]
    return cut + flipped


@pytest.mark.parametrize(
    ("codec", "message"), [(blob.FROM_FETCHER, m) for m in FETCHER] + [(blob.FROM_SERVER, m) for m in SERVER]
)
def test_every_truncation_and_bit_flip_is_another_valid_message_or_a_protocol_error(
    codec: Codec[object], message: object
) -> None:
    body = codec.encode(message)[HEADER_BYTES:]
    for damaged in _damaged(body):
        with contextlib.suppress(RemoteProtocolError):
            assert codec.decode(damaged) is not None


@pytest.mark.parametrize("body", _damaged(b"\x82\xa4type\xa4want\xa5index\x05")[:18])
def test_a_truncated_message_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        blob.FROM_FETCHER.decode(body)


@pytest.mark.parametrize(
    "message",
    [
        blob.Want(-1),
        blob.Want(blob.MAX_CHUNKS),
        blob.Open("AB" * 32),
        blob.Open("../../etc/passwd"),
        blob.Open("ab" * 31),
        blob.Open("ab" * 32 + "\n"),
        blob.ChunkPart(0, 0, b""),
        blob.ChunkPart(0, CHUNK_BYTES, b"x"),
        blob.ChunkPart(0, 0, bytes(blob.PART_BYTES + 1)),
        blob.Have(blob.MAX_CHUNKS + 1, b""),
        blob.Have(1, bytes(blob.MAX_CHUNKS // 8 + 1)),
        blob.Busy(0, -1.0),
        blob.Busy(0, float("nan")),
        blob.Busy(0, float("inf")),
        blob.NotHave(1 << 70),
    ],
)
def test_what_is_out_of_bounds_is_a_protocol_error(message: blob.FromFetcher | blob.FromServer) -> None:
    codec: Any = blob.FROM_FETCHER if isinstance(message, blob.FromFetcher) else blob.FROM_SERVER
    try:
        body = codec.encode(message)[HEADER_BYTES:]
    except OverflowError:
        body = b"\x82\xa4type\xa8not_have\xa5index\xcf" + b"\xff" * 8
    with pytest.raises(RemoteProtocolError):
        codec.decode(body)


def test_the_largest_blobs_haves_fit_a_frame() -> None:
    haves = Haves.all(blob.MAX_CHUNKS)
    assert blob.FROM_SERVER.decode(blob.FROM_SERVER.encode(blob.have_of(haves))[HEADER_BYTES:]) == blob.have_of(haves)


def test_haves_of_another_shape_than_the_blob_are_refused() -> None:
    assert blob.haves_of(blob.Have(2, b"\x02"), MAP) == Haves(2, b"\x02")
    for have in (blob.Have(3, b"\x02"), blob.Have(2, b""), blob.Have(2, b"\x01\x00"), blob.Have(2, b"\x04")):
        with pytest.raises(RemoteProtocolError):
            blob.haves_of(have, MAP)
    empty = ChunkMap(DIGEST, 0, bytes(32), b"")
    assert blob.haves_of(blob.Have(0, b""), empty) == Haves.none(0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3 * CHUNK_BYTES // 4), max_size=6), st.integers(0, 1))
def test_parts_in_order_make_the_chunk_however_they_are_cut(cuts: list[int], index: int) -> None:
    assembly = blob.Assembly(MAP)
    offset, length = MAP.span(index)
    places = sorted({0, length, *(cut % length for cut in cuts)})
    chunk = None
    for start, end in itertools.pairwise(places):
        assert chunk is None
        chunk = assembly.add(blob.ChunkPart(index, start, DATA[offset + start : offset + end]))
    assert chunk == DATA[offset : offset + length]


def test_parts_out_of_order_mixed_or_too_long_are_protocol_errors() -> None:
    for parts in (
        [blob.ChunkPart(0, 1, b"x")],
        [blob.ChunkPart(2, 0, b"x")],
        [blob.ChunkPart(1, 0, b"tail!")],
        [blob.ChunkPart(0, 0, b"x"), blob.ChunkPart(1, 0, b"tail")],
        [blob.ChunkPart(0, 0, b"x"), blob.ChunkPart(0, 0, b"x")],
        [blob.ChunkPart(0, 0, b"x"), blob.ChunkPart(0, 2, b"x")],
    ):
        assembly = blob.Assembly(MAP)
        with pytest.raises(RemoteProtocolError):  # noqa: PT012
            for part in parts:
                assembly.add(part)


def test_a_chunk_that_is_dropped_half_way_leaves_room_for_the_next() -> None:
    assembly = blob.Assembly(MAP)
    assembly.add(blob.ChunkPart(0, 0, b"abc"))
    assert assembly.drop(1) == 0
    assert assembly.drop(0) == 3
    assert assembly.add(blob.ChunkPart(1, 0, b"tail")) == b"tail"


SETS = st.integers(0, (1 << 20) - 1)


@given(SETS, SETS)
def test_news_take_who_knew_what_was_there_before_to_what_is_there_now(before: int, now: int) -> None:
    old, new = (Haves(20, bits.to_bytes(3, "little")) for bits in (before, now))
    match blob.news_of(old, new):
        case None:
            assert old == new
        case blob.Gained() as gained:
            assert not before & ~now
            assert blob.haves_with(old, gained) == new
        case have:
            assert before & ~now
            assert have == blob.have_of(new)


def test_many_gained_chunks_are_told_as_a_whole_list() -> None:
    count = 10 * blob.MAX_GAINED
    assert blob.news_of(Haves.none(count), Haves.all(count)) == blob.have_of(Haves.all(count))


def test_a_gained_chunk_that_the_blob_does_not_have_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        blob.haves_with(Haves.none(20), blob.Gained((3, 20)))


def test_what_a_fetcher_may_ask_ahead_holds_its_window_twice() -> None:
    assert 2 * MAX_WINDOW <= blob.MAX_WANTS
