"""STUN against the test vectors of RFC 5769, and against whatever a stranger may send."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import stun

TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
# RFC 5769, 2.1: a request with SOFTWARE, PRIORITY, ICE-CONTROLLED, USERNAME, MESSAGE-INTEGRITY and FINGERPRINT
SAMPLE_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932ff9b151263b36"
    "000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf"
)
# RFC 5769, 2.2 and 2.3: answers with an IPv4 and an IPv6 address
SAMPLE_ANSWER_4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
SAMPLE_ANSWER_6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)
ADDRESSES = [
    ("192.0.2.1", 32853),
    ("2001:db8:1234:5678:11:2233:4455:6677", 32853),
    ("255.255.255.255", 65535),
    ("::", 0),
]


def with_attributes(*attributes: tuple[int, bytes], kind: int = stun.REQUEST) -> bytes:
    body = b"".join(struct.pack(">HH", at, len(v)) + v + b"\0" * (-len(v) % 4) for at, v in attributes)
    return struct.pack(">HHI", kind, len(body), 0x2112A442) + TRANSACTION + body


def test_the_sample_request_is_understood() -> None:
    assert stun.parse_request(SAMPLE_REQUEST) == stun.BindingRequest(TRANSACTION, (), fingerprint=True)


@pytest.mark.parametrize(
    ("sample", "address"), [(SAMPLE_ANSWER_4, ADDRESSES[0]), (SAMPLE_ANSWER_6, ADDRESSES[1])], ids=["ipv4", "ipv6"]
)
def test_the_sample_answers_are_understood(sample: bytes, address: tuple[str, int]) -> None:
    assert stun.parse_answer(sample, TRANSACTION).mapped == address


def test_our_bytes_are_what_they_were() -> None:
    padded = "80220008" + b"        ".hex()
    request = "000100142112a442" + TRANSACTION.hex() + padded + "80280004"
    assert stun.encode_request(TRANSACTION).hex()[:-8] == request
    answer = stun.encode_answer(stun.BindingRequest(TRANSACTION), ADDRESSES[0])
    assert answer.hex() == "0101000c2112a442" + TRANSACTION.hex() + "002000080001a147e112a643"


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("fingerprint", [True, False])
def test_an_answer_says_what_was_put_in(address: tuple[str, int], fingerprint: bool) -> None:
    request = stun.parse_request(stun.encode_request(TRANSACTION, fingerprint=fingerprint))
    data = stun.encode_answer(request, address, origin=ADDRESSES[1], other=ADDRESSES[0])
    assert len(data) <= stun.MAX_ANSWER_BYTES
    assert stun.parse_answer(data, TRANSACTION) == stun.BindingAnswer(TRANSACTION, address, ADDRESSES[1], ADDRESSES[0])


def test_a_zone_of_ours_does_not_travel() -> None:
    data = stun.encode_answer(stun.BindingRequest(TRANSACTION), ("fe80::1%eth0", 9))
    assert stun.parse_answer(data, TRANSACTION).mapped == ("fe80::1", 9)


def test_an_attribute_that_must_be_understood_is_named_in_the_error() -> None:
    request = stun.parse_request(with_attributes((0x0003, bytes(4)), (0x0026, b""), (0x0003, b""), (0xC000, b"x")))
    assert request.unknown == (0x0003, 0x0026)
    data = stun.encode_answer(request, ADDRESSES[0])
    assert stun.parse_answer(data, TRANSACTION) == stun.BindingAnswer(TRANSACTION, error=420)
    assert data.endswith(bytes.fromhex("000a000400030026"))


def test_the_largest_answer_is_bounded_whatever_is_asked() -> None:
    request = stun.parse_request(with_attributes(*((at, b"") for at in range(0x100, 0x180))))
    assert len(stun.encode_answer(request, ADDRESSES[1])) <= stun.MAX_ANSWER_BYTES


@pytest.mark.parametrize("length", range(len(SAMPLE_REQUEST)))
def test_a_truncated_request_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        stun.parse_request(SAMPLE_REQUEST[:length])


def test_a_flipped_bit_is_noticed_unless_it_hides_the_fingerprint() -> None:
    for bit in range(len(SAMPLE_REQUEST) * 8):
        data = bytearray(SAMPLE_REQUEST)
        data[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(RemoteProtocolError):
            assert not stun.parse_request(bytes(data)).fingerprint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SAMPLE_ANSWER_4,
        with_attributes(kind=0x0011),
        with_attributes((1, bytes(600))),
        with_attributes() + b"more",
        with_attributes()[:8] + bytes(12) + b"\x00\x01\x00\x08",
        with_attributes((0x8028, bytes(4))),
    ],
    ids=["empty", "answer", "indication", "long", "trailing", "attribute longer", "fingerprint"],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        stun.parse_request(data)


@pytest.mark.parametrize(
    "data",
    [
        SAMPLE_REQUEST,
        with_attributes(kind=stun.SUCCESS),
        with_attributes((0x0020, b"\0\x01\0"), kind=stun.SUCCESS),
        with_attributes((0x0020, b"\0\x03" + bytes(18)), kind=stun.SUCCESS),
    ],
    ids=["request", "no address", "short address", "unknown family"],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        stun.parse_answer(data, TRANSACTION)


def test_an_answer_to_somebody_elses_question_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        stun.parse_answer(SAMPLE_ANSWER_4, bytes(12))


@given(st.binary(max_size=700), st.booleans())
def test_garbage_raises_nothing_else(garbage: bytes, headed: bool) -> None:
    data = with_attributes()[:4] + with_attributes()[4:20] + garbage if headed else garbage
    if headed:
        data = data[:2] + struct.pack(">H", len(garbage)) + data[4:]
    for parse in (stun.parse_request, lambda raw: stun.parse_answer(raw, TRANSACTION), stun.message_length):
        with contextlib.suppress(RemoteProtocolError):
            parse(data)
