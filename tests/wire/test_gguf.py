"""GGUF headers: what is read, and that nothing damaged, truncated or huge gets past."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.catalog import TensorShape
from meshmax.base.errors import InvalidRequest
from meshmax.testing.gguf import build_gguf
from meshmax.wire import gguf
from meshmax.wire.gguf import GgufHeader, LongArray, try_parse_header

SMALL = build_gguf(tensor_bytes=64)


def parse(data: bytes) -> GgufHeader:
    header = try_parse_header(data, len(data))
    assert header is not None
    return header


def test_a_header_tells_architecture_numbers_texts_and_weights() -> None:
    header = parse(build_gguf({"x.list": [1, 2], "x.flag": True, "x.half": 0.5}, tensor_bytes=4096))
    assert header.architecture == "llama"
    assert header.number("general.file_type") == 3
    assert header.number("context_length") == 2048
    assert header.number("missing") == 0
    assert header.text("general.name") == "tiny"
    assert header.text("general.file_type") == ""
    assert header.has("embedding_length")
    assert (header.values["x.list"], header.values["x.flag"], header.values["x.half"]) == ([1, 2], True, 0.5)
    assert (header.tensors, header.parameters) == (1, 1024)
    assert header.data_offset % 32 == 0


def test_long_arrays_are_counted_and_not_kept() -> None:
    header = parse(build_gguf({"a.texts": ["x"] * 100, "a.numbers": list(range(100)), "a.few": ["x"] * 5}))
    assert header.values["a.texts"] == header.values["a.numbers"] == LongArray(100)
    assert header.values["a.few"] == ["x"] * 5


def test_a_whole_header_has_arrays_up_to_a_bound_and_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_gguf({"a.texts": ["x"] * 100, "a.numbers": list(range(100))}, tensor_bytes=64)
    header = try_parse_header(data, len(data), whole=True)
    assert header is not None
    assert (header.values["a.texts"], header.values["a.numbers"]) == (["x"] * 100, list(range(100)))
    assert header.shapes == (TensorShape("weights", "F32", (16,)),)
    assert parse(data).shapes == ()
    monkeypatch.setattr(gguf, "MAX_ITEMS", 99)
    bounded = try_parse_header(data, len(data), whole=True)
    assert bounded is not None
    assert bounded.values["a.texts"] == LongArray(100)


def test_a_prefix_that_ends_inside_the_header_asks_for_more() -> None:
    data = build_gguf()
    size = parse(data).data_offset
    assert all(try_parse_header(data[:length], len(data)) is None for length in range(4, size - 31))


def test_every_truncated_file_is_refused() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(InvalidRequest, match=r"truncated|not a GGUF"):
            try_parse_header(SMALL[:length], length)


def test_a_truncated_file_is_refused_by_its_header_alone() -> None:
    data = build_gguf(tensor_bytes=1 << 20)
    with pytest.raises(InvalidRequest, match=r"truncated.*are missing"):
        try_parse_header(data[:1024], len(data) - 1)


def test_a_bit_flip_gives_a_header_or_an_error_of_the_tree() -> None:
    for bit in range(8 * len(SMALL)):
        data = bytearray(SMALL)
        data[bit >> 3] ^= 1 << (bit & 7)
        with suppress(InvalidRequest):
            try_parse_header(bytes(data), len(data))


@given(st.binary(max_size=400))
def test_garbage_after_the_magic_gives_an_error_of_the_tree(data: bytes) -> None:
    for prefix in (b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 1, 1)):
        try:
            try_parse_header(prefix + data, len(prefix + data))
        except InvalidRequest:
            continue


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not a GGUF"),
        (b"GG", "not a GGUF"),
        (b"PK\x03\x04 a zip file", "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "unknown type"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "array of items"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 99), "dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQQIQ", 3, 1, 0, 1, b"t", 3, 1 << 60, 1 << 60, 1, 0, 0), "weights"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 64, 0, 1 << 63), "truncated"),
    ],
)
def test_a_file_that_is_not_valid_is_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        try_parse_header(data, len(data))


@pytest.mark.parametrize("alignment", [0, 1 << 31])
def test_an_alignment_that_is_not_valid_is_refused(alignment: int) -> None:
    data = build_gguf({"general.alignment": alignment})
    with pytest.raises(InvalidRequest, match="alignment"):
        try_parse_header(data, len(data))


def test_a_tensor_type_that_is_not_known_yet_is_taken_if_its_data_begins_inside_the_file() -> None:
    data = SMALL.replace(struct.pack("<IQIQ", 1, 16, 0, 0), struct.pack("<IQIQ", 1, 16, 4000, 0))
    assert parse(data).parameters == 16
