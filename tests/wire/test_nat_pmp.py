"""NAT-PMP messages: golden bytes of RFC 6886, truncation, noise."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire.nat_pmp import ExternalAddress, Failed, Mapped, ask_address, ask_mapping, decode_answer

ADDRESS = bytes.fromhex("0080 0000 0000002a 0b162101")
MAPPED = bytes.fromhex("0082 0000 0000002a 2cab 9c41 00001c20")


def test_questions_are_as_the_rfc_has_them() -> None:
    assert ask_address().hex() == "0000"
    assert ask_mapping("udp", 11435, 11435, 7200).hex() == "000100002cab2cab00001c20"
    assert ask_mapping("tcp", 11435, 0, 0).hex() == "000200002cab000000000000"


def test_answers_are_read() -> None:
    assert decode_answer(ADDRESS) == ExternalAddress(42, "11.22.33.1")
    assert decode_answer(MAPPED) == Mapped("tcp", 42, 11435, 40001, 7200)


@pytest.mark.parametrize("size", [8, 12, 16])
def test_a_refusal_is_read_whatever_its_length(size: int) -> None:
    failed = decode_answer(bytes.fromhex("0081 0002 0000002a").ljust(size, b"\0"))
    assert failed == Failed(1, 2)
    assert "switched off" in failed.sentence


def test_an_answer_in_another_version_is_a_refusal() -> None:
    assert decode_answer(bytes.fromhex("0280 0001 0000002a") + bytes(16)) == Failed(0, 1)
    assert "version" in Failed(0, 1).sentence
    assert "code 77" in Failed(0, 77).sentence


@pytest.mark.parametrize("whole", [ADDRESS, MAPPED])
def test_what_is_cut_or_too_long_is_no_message(whole: bytes) -> None:
    for data in [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + bytes(2000)]:
        with pytest.raises(RemoteProtocolError):
            decode_answer(data)


def test_a_mapping_of_port_nothing_is_no_message() -> None:
    for data in (MAPPED[:8] + b"\0\0" + MAPPED[10:], MAPPED[:10] + b"\0\0" + MAPPED[12:]):
        with pytest.raises(RemoteProtocolError):
            decode_answer(data)


@given(st.binary(max_size=40))
def test_noise_is_read_or_refused(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        decode_answer(data)
