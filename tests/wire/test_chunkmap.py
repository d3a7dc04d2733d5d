"""Chunk maps: the bytes are fixed for good, and nothing that was tampered with passes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import ChunkMismatch, ManifestInvalid, MeshmaxError
from meshmax.base.ids import Sha256
from meshmax.base.model import MAX_BLOB_BYTES, ChunkMap
from meshmax.base.units import MIB
from meshmax.wire.chunkmap import (
    MAX_MAP_BYTES,
    BlobHasher,
    check_chunk,
    chunk_map_of,
    chunk_map_of_bytes,
    decode_map,
    encode_map,
    map_address,
)
from meshmax.wire.signed import canonical

HELLO = chunk_map_of_bytes(b"hello")
TWO_CHUNKS = chunk_map_of_bytes(b"a" * MIB + b"b")


def test_the_encoding_of_a_map_never_changes() -> None:
    assert encode_map(HELLO).hex() == (
        "a66473697a650566626c616b65335820ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f"
        "66686173686573582"
        "0ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f"
        "66736861323536582"
        "02cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        "6776657273696f6e016b6368756e6b5f62797465731a00100000"
    )
    assert map_address(encode_map(HELLO)) == "a871fd64931150a5c65211f01acc4737119a6408ff81cbed0e7dbdc27fd06fb3"


def test_the_map_of_nothing_has_no_chunks() -> None:
    empty = chunk_map_of_bytes(b"")
    assert (empty.count, empty.size, empty.hashes) == (0, 0, b"")
    assert decode_map(encode_map(empty)) == empty


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_a_map_has_one_hash_for_each_chunk(size: int) -> None:
    data = bytes(size)
    chunk_map = chunk_map_of_bytes(data)
    assert len(chunk_map.hashes) == 32 * -(-size // MIB)
    for index in range(chunk_map.count):
        offset, length = chunk_map.span(index)
        check_chunk(chunk_map, index, memoryview(data)[offset : offset + length])
    assert decode_map(encode_map(chunk_map)) == chunk_map


@pytest.mark.parametrize(
    ("index", "data"), [(0, b"a" * (MIB - 1) + b"b"), (0, b"b"), (1, b"c"), (1, b"bb"), (1, b""), (2, b"b"), (-1, b"b")]
)
def test_bytes_that_are_not_the_chunk_are_refused(index: int, data: bytes) -> None:
    with pytest.raises(ChunkMismatch):
        check_chunk(TWO_CHUNKS, index, data)


def test_hashing_in_steps_gives_the_map_of_the_whole() -> None:
    hasher = BlobHasher()
    hasher.update(bytearray(b"a" * MIB))
    hasher.update(memoryview(b"b"))
    assert hasher.chunk_map() == TWO_CHUNKS


_MAPS = st.builds(
    lambda size, seed: ChunkMap(
        Sha256(bytes([seed] * 32).hex()), size, bytes([seed ^ 1] * 32), bytes([seed ^ 2] * (32 * -(-size // MIB)))
    ),
    st.integers(0, 40 * MIB),
    st.integers(0, 255),
)


@given(_MAPS)
def test_what_was_encoded_is_decoded(chunk_map: ChunkMap) -> None:
    assert decode_map(encode_map(chunk_map)) == chunk_map


@given(_MAPS, _MAPS)
def test_maps_have_one_address_exactly_if_they_are_equal(one: ChunkMap, other: ChunkMap) -> None:
    assert (map_address(encode_map(one)) == map_address(encode_map(other))) == (one == other)


def test_every_truncation_is_refused() -> None:
    for length in range(len(encode_map(HELLO))):
        with pytest.raises(ManifestInvalid):
            decode_map(encode_map(HELLO)[:length])


def test_every_bit_flip_is_refused_or_gives_another_valid_map() -> None:
    for bit in range(8 * len(encode_map(HELLO))):
        data = bytearray(encode_map(HELLO))
        data[bit >> 3] ^= 1 << (bit & 7)
        try:
            chunk_map = decode_map(bytes(data))
        except ManifestInvalid:
            continue
        assert chunk_map != HELLO
        assert encode_map(chunk_map) == bytes(data)


@given(st.binary(max_size=300))
def test_garbage_gives_an_error_of_the_tree(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        decode_map(data)


def _fields(**changes: object) -> bytes:
    word = {
        "version": 1,
        "size": 5,
        "chunk_bytes": MIB,
        "sha256": bytes.fromhex(HELLO.sha256),
        "blake3": HELLO.blake3,
        "hashes": HELLO.hashes,
    }
    return canonical({key: value for key, value in {**word, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"size": -1},
        {"size": MAX_BLOB_BYTES + 1},
        {"size": MIB + 1},
        {"size": 0},
        {"chunk_bytes": 2 * MIB},
        {"chunk_bytes": 0},
        {"sha256": bytes(31)},
        {"sha256": HELLO.sha256},
        {"blake3": bytes(33)},
        {"hashes": bytes(64)},
        {"hashes": None},
        {"more": 1},
        {"size": 5.0},
        {"size": 1 << 70},
    ],
)
def test_a_map_with_a_wrong_field_is_refused(changes: dict[str, object]) -> None:
    assert decode_map(_fields()) == HELLO
    with pytest.raises(ManifestInvalid):
        decode_map(_fields(**changes))


def test_an_encoding_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(ManifestInvalid, match="over the limit"):
        decode_map(bytes(MAX_MAP_BYTES + 1))


@pytest.mark.parametrize(
    "hex_bytes", ["d81e820100", "c482011a00", "d81c81d81d00", "c074", "d823615b", "a1a10101", "f6"]
)
def test_odd_cbor_is_refused(hex_bytes: str) -> None:
    with pytest.raises(ManifestInvalid):
        decode_map(bytes.fromhex(hex_bytes))


def test_a_map_that_does_not_fit_together_is_not_made() -> None:
    with pytest.raises(ManifestInvalid):
        chunk_map_of(HELLO.sha256, 5, HELLO.blake3, [HELLO.blake3, HELLO.blake3])
    with pytest.raises(MeshmaxError):
        encode_map(msgspec.structs.replace(HELLO, sha256=Sha256("../x")))
