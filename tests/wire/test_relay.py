"""Circuit relay v2 messages: golden bytes, what comes back, and what a stranger may send."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import peer_id_of
from meshmax.wire import relay
from meshmax.wire.protobuf import data_field, number_field, uvarint

PEER = peer_id_of(bytes(range(32)))
MULTIHASH = "0024" + "08011220" + bytes(range(32)).hex()
LIMIT = relay.Limit(1800, 64 << 20)


def body(message: bytes) -> bytes:
    taken = relay.try_take(message)
    assert taken is not None
    assert taken[1] == b""
    return taken[0]


def test_requests_are_the_bytes_of_the_specification() -> None:
    assert relay.encode_reserve().hex() == "020800"
    assert relay.encode_connect(PEER).hex() == "2c" + "0801" + "1228" + "0a26" + MULTIHASH
    stop = relay.encode_stop_connect(PEER, relay.Limit(120, 131072)).hex()
    assert stop == "34" + "0800" + "1228" + "0a26" + MULTIHASH + "1a06" + "0878" + "10808008"
    assert relay.encode_stop_status(relay.OK).hex() == "0408012064"
    assert relay.encode_hop_status(relay.NO_RESERVATION).hex() == "05080228cc01"


def test_what_is_encoded_is_what_is_read() -> None:
    assert relay.parse_hop_request(body(relay.encode_reserve())) == relay.Reserve()
    assert relay.parse_hop_request(body(relay.encode_connect(PEER))) == relay.Connect(PEER)
    assert relay.parse_stop_connect(body(relay.encode_stop_connect(PEER, LIMIT))) == relay.Connect(PEER, LIMIT)
    assert relay.parse_stop_status(body(relay.encode_stop_status(relay.CONNECTION_FAILED))) == relay.CONNECTION_FAILED


def test_a_reservation_says_until_when_and_where() -> None:
    addresses = [f"/ip4/192.0.2.{n}/tcp/11435/p2p/{PEER}" for n in range(20)]
    data = relay.encode_hop_status(
        relay.OK, expires_at_s=1_800_000_000, addresses=["/memory/1", *addresses], limit=LIMIT
    )
    status = relay.parse_hop_status(body(data))
    assert (status.status, status.expires_at_s, status.limit) == (relay.OK, 1_800_000_000, LIMIT)
    assert len(status.addresses) == relay.MAX_ADDRESSES
    assert status.addresses[0].hex() == "04c0000200062cab" + "a50326" + MULTIHASH
    assert len(data) < relay.MAX_MESSAGE_BYTES


def test_a_request_whose_zero_was_left_out_is_a_request() -> None:
    assert relay.parse_hop_request(b"") == relay.Reserve()
    peer = data_field(2, data_field(1, bytes.fromhex(MULTIHASH)))
    assert relay.parse_stop_connect(peer) == relay.Connect(PEER)


def test_a_reservation_without_a_status_counts_as_granted_and_nothing_at_all_as_refused() -> None:
    assert relay.parse_hop_status(number_field(1, 2) + data_field(3, number_field(1, 7))).status == relay.OK
    assert relay.parse_hop_status(number_field(1, 2)).status == relay.RESERVATION_REFUSED


@pytest.mark.parametrize(
    "message",
    [
        number_field(1, 2),
        number_field(1, 9),
        number_field(1, 1),
        number_field(1, 1) + data_field(2, b""),
        number_field(1, 1) + data_field(2, data_field(1, b"\x12\x20" + bytes(32))),
        number_field(1, 0) * 65,
        b"\xff",
    ],
    ids=["a status", "unknown", "no peer", "empty peer", "another key", "many fields", "cut short"],
)
def test_what_is_no_request_is_refused(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        relay.parse_hop_request(message)


def test_messages_are_taken_one_by_one_and_what_follows_is_kept() -> None:
    data = relay.encode_reserve() + b"noise"
    for cut in range(3):
        assert relay.try_take(data[:cut]) is None
    assert relay.try_take(data) == (b"\x08\x00", b"noise")


@pytest.mark.parametrize("head", [b"\x00", uvarint(relay.MAX_MESSAGE_BYTES + 1), b"\xff\xff\xff"])
def test_a_length_out_of_bounds_is_refused_before_anything_is_waited_for(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        relay.try_take(head)


@given(st.binary(max_size=300))
def test_garbage_raises_nothing_else(garbage: bytes) -> None:
    for parse in (
        relay.parse_hop_request,
        relay.parse_hop_status,
        relay.parse_stop_connect,
        relay.parse_stop_status,
        relay.try_take,
    ):
        with contextlib.suppress(RemoteProtocolError):
            parse(garbage)
