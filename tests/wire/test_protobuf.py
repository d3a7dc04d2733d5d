"""Protobuf fields: bounded, tolerant of what is new, strict about what is broken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire.protobuf import Fields, data_field, number_field, read_uvarint, uvarint


@given(st.integers(0, 2**64 - 1))
def test_a_varint_is_read_as_it_was_written(value: int) -> None:
    assert read_uvarint(b"x" + uvarint(value) + b"y", 1) == (value, 1 + len(uvarint(value)))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 10, b"\x80\x00", b"\xff" * 9 + b"\x02"])
def test_a_varint_that_is_cut_short_padded_or_over_64_bits_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_uvarint(data, 0)


def test_fields_are_found_by_number_and_unknown_ones_are_ignored() -> None:
    fixed = uvarint(9 << 3 | 5) + bytes(4) + uvarint(10 << 3 | 1) + bytes(8)
    data = (
        number_field(1, 5)
        + data_field(2, b"a")
        + fixed
        + data_field(2, b"b")
        + number_field(1, 6)
        + data_field(99, b"")
    )
    fields = Fields(data, 8)
    assert (fields.number(1), fields.data(2), fields.repeated(2)) == (6, b"b", [b"a", b"b"])
    assert (fields.number(2), fields.data(1), fields.repeated(7)) == (None, None, [])


def test_more_fields_than_are_allowed_are_refused() -> None:
    assert Fields(number_field(1, 1) * 3, 3).number(1) == 1
    with pytest.raises(RemoteProtocolError, match="more than 3 fields"):
        Fields(number_field(1, 1) * 4, 3)


@pytest.mark.parametrize("data", [uvarint(1 << 3 | 2) + b"\x05ab", uvarint(1 << 3 | 3), uvarint(1 << 3 | 1) + bytes(7)])
def test_a_field_cut_short_or_of_an_unknown_kind_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Fields(data, 8)
