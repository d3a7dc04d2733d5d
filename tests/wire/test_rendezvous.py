"""Rendezvous messages: what we write others read, what others write we read, and nothing else passes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.discovery.rendezvous import messages as theirs
from libp2p.discovery.rendezvous.pb.rendezvous_pb2 import Message as TheirMessage
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import rendezvous
from meshmax.wire.peer_record import MAX_RECORD_BYTES, seal_record
from meshmax.wire.protobuf import data_field, number_field, read_uvarint, uvarint
from meshmax.wire.rendezvous import (
    Discover,
    DiscoverResponse,
    Message,
    Register,
    RegisterResponse,
    Unregister,
    decode,
    encode,
    encode_peer_info,
    namespace_of,
    try_read_peer_info,
)

SIGNER = SeededSigner(7)
RECORD = seal_record(SIGNER.peer_id, 3, ["/ip4/10.0.0.5/tcp/11435"], SIGNER.sign)
MESSAGES: list[Message] = [
    Register("meshmax/open", RECORD, 7200),
    Register("meshmax/open", RECORD),
    RegisterResponse(rendezvous.OK, "", 7200),
    RegisterResponse(rendezvous.E_INVALID_TTL, "from 7200 to 259200 seconds"),
    Unregister("meshmax/open"),
    Discover("meshmax/open", 100, b"cookie"),
    Discover("", None),
    DiscoverResponse((Register("meshmax/open", RECORD, 60), Register("meshmax/open", b"", 61)), b"cookie"),
    DiscoverResponse(status=rendezvous.E_INVALID_COOKIE, text="of another time"),
]


def body(message: Message) -> bytes:
    data = encode(message)
    length, at = read_uvarint(data, 0)
    assert length == len(data) - at
    return data[at:]


def their_message(message: Message) -> TheirMessage:
    parsed = TheirMessage()
    parsed.ParseFromString(body(message))
    return parsed


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_was_encoded_is_decoded(message: Message) -> None:
    assert decode(body(message)) == message


def test_the_bytes_of_a_registration_are_those_of_the_specification() -> None:
    assert encode(Register("ab", b"xyz", 7200)).hex() == "10" + "0800" + "120c" + "0a026162" + "120378797a" + "18a038"
    assert encode(Discover("ab", 5, b"c")).hex() == "0d" + "0803" + "2a09" + "0a026162" + "1005" + "1a0163"
    assert encode(Unregister("ab")).hex() == "08" + "0802" + "2204" + "0a026162"


def test_requests_that_another_library_writes_are_read() -> None:
    peer_id = ID.from_string(SIGNER.peer_id)
    register = theirs.create_register_message("ns", peer_id, [Multiaddr("/ip4/10.0.0.5/tcp/11435")], 7200)
    message = decode(register.SerializeToString())
    assert isinstance(message, Register)
    assert (message.namespace, message.ttl_s) == ("ns", 7200)
    assert try_read_peer_info(message.record) == (SIGNER.peer_id, ("/ip4/10.0.0.5/tcp/11435",))
    assert decode(theirs.create_discover_message("ns", 5, b"c").SerializeToString()) == Discover("ns", 5, b"c")
    assert decode(theirs.create_discover_message("ns").SerializeToString()) == Discover("ns")
    assert decode(theirs.create_unregister_message("ns", peer_id).SerializeToString()) == Unregister("ns")


def test_requests_of_ours_are_read_by_another_library() -> None:
    info = encode_peer_info(b"id", [b"one", b"two"])
    register = their_message(Register("ns", info, 7200))
    assert register.type == TheirMessage.REGISTER
    assert (register.register.ns, register.register.ttl, register.register.peer.id) == ("ns", 7200, b"id")
    assert list(register.register.peer.addrs) == [b"one", b"two"]
    discover = their_message(Discover("ns", 5, b"c"))
    assert (discover.type, discover.discover.ns) == (TheirMessage.DISCOVER, "ns")
    assert (discover.discover.limit, discover.discover.cookie) == (5, b"c")
    left = their_message(Unregister("ns", b"id")).unregister
    assert (left.ns, left.id) == ("ns", b"id")


def test_answers_pass_between_us_and_another_library() -> None:
    refused = theirs.create_register_response_message(TheirMessage.E_UNAVAILABLE, "full", 0)
    assert decode(refused.SerializeToString()) == RegisterResponse(rendezvous.E_UNAVAILABLE, "full", 0)
    granted = their_message(RegisterResponse(rendezvous.OK, "", 7200)).registerResponse
    assert (granted.status, granted.ttl) == (TheirMessage.OK, 7200)
    page = their_message(DiscoverResponse((Register("ns", encode_peer_info(b"id", []), 9),), b"next")).discoverResponse
    assert (page.cookie, page.registrations[0].peer.id, page.registrations[0].ttl) == (b"next", b"id", 9)
    empty = theirs.create_discover_response_message([], b"")
    assert decode(empty.SerializeToString()) == DiscoverResponse()


@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_cut_short_is_refused(message: Message, data: st.DataObject) -> None:
    whole = body(message)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(RemoteProtocolError):
        decode(cut)


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_read_never_anything_else(garbage: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(garbage)


@given(st.sampled_from(MESSAGES), st.data())
def test_a_flipped_bit_is_refused_or_read_never_anything_else(message: Message, data: st.DataObject) -> None:
    flipped = bytearray(body(message))
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(RemoteProtocolError):
        decode(bytes(flipped))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="unknown type 100"):
        decode(number_field(1, 100) + data_field(102, b""))


def test_more_registrations_than_the_specification_allows_are_refused() -> None:
    most = DiscoverResponse((Register("", b""),) * rendezvous.MAX_REGISTRATIONS_READ)
    assert decode(body(most)) == most
    with pytest.raises(RemoteProtocolError):
        decode(body(DiscoverResponse((Register("", b""),) * (rendezvous.MAX_REGISTRATIONS_READ + 1))))


def test_a_record_a_namespace_a_text_and_a_cookie_have_bounds() -> None:
    assert decode(body(Register("ns", bytes(MAX_RECORD_BYTES + 1)))) == Register("ns", b"")
    long = decode(body(Unregister("n" * 4000)))
    assert isinstance(long, Unregister)
    assert len(long.namespace) == rendezvous.MAX_NAMESPACE_BYTES + 1
    answer = decode(body(RegisterResponse(300, "\x1b[31m" + "t" * 1000)))
    assert isinstance(answer, RegisterResponse)
    assert len(answer.text) == rendezvous.MAX_STATUS_TEXT
    assert answer.text.startswith(" [31mt")
    with pytest.raises(RemoteProtocolError, match="cookie"):
        decode(body(Discover("ns", 1, bytes(rendezvous.MAX_COOKIE_BYTES + 1))))


def test_the_largest_page_fits_what_a_client_reads() -> None:
    assert rendezvous.MAX_PAGE_BYTES + rendezvous.MAX_PAGE * (rendezvous.MAX_NAMESPACE_BYTES + 32) < 256 * 1024
    assert len(encode(Register("n" * 255, bytes(MAX_RECORD_BYTES), 1 << 63))) <= rendezvous.MAX_REQUEST_BYTES


def test_each_mesh_has_a_namespace_of_its_own_that_does_not_tell_its_id() -> None:
    mesh = MeshId(SeededSigner(1).peer_id)
    assert namespace_of(OPEN_MESH) == "meshmax/open"
    assert namespace_of(mesh) != namespace_of(MeshId(SeededSigner(2).peer_id))
    assert mesh not in namespace_of(mesh)
    assert len(namespace_of(mesh)) == len("meshmax/") + 64


def test_no_unsigned_form_is_read_where_a_signed_record_stands() -> None:
    assert try_read_peer_info(RECORD) is None
    assert try_read_peer_info(uvarint(1 << 63)) is None
