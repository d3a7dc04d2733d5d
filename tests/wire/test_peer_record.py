"""Signed peer records: what we sign other libraries verify, what they sign we verify, and nothing forged passes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.envelope import seal_record as their_seal
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord as TheirRecord
from multiaddr import Multiaddr

from meshmax.base.errors import ManifestInvalid
from meshmax.base.status import MAX_ADDRESSES
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.peer_record import MAX_RECORD_BYTES, PeerRecord, open_record, seal_record

SIGNER, OTHER = SeededSigner(7), SeededSigner(8)
ADDRESSES = ("/ip4/10.0.0.5/tcp/11435", "/ip6/fd00::5/tcp/11435", "/dns4/host.example/tcp/443")
SEALED = seal_record(SIGNER.peer_id, 3, ADDRESSES, SIGNER.sign)
GOLDEN = (
    "0a2408011220" + "3ee2a8a7283cb2fd728943daa127ef09e483071a8b4bc699ba4522f09b14cfde" + "12020301" + "1a"
)  # the key of seed 7, Ed25519, behind its PublicKey's head; the payload's type; the payload follows


def test_a_sealed_record_is_opened_again() -> None:
    assert open_record(SEALED) == PeerRecord(SIGNER.peer_id, 3, ADDRESSES)


def test_the_envelope_begins_as_the_specification_says() -> None:
    assert SEALED.hex().startswith(GOLDEN)


def test_another_library_verifies_what_we_sign() -> None:
    _, record = consume_envelope(SEALED, "libp2p-peer-record")
    assert (str(record.peer_id), record.seq, tuple(map(str, record.addrs))) == (SIGNER.peer_id, 3, ADDRESSES)


def test_what_another_library_signs_has_the_very_bytes_of_ours() -> None:
    record = TheirRecord(ID.from_string(SIGNER.peer_id), [Multiaddr(text) for text in ADDRESSES], 3)
    assert their_seal(record, Ed25519PrivateKey.from_bytes(SIGNER.private_bytes)).marshal_envelope() == SEALED


def test_our_own_id_at_the_end_of_an_address_is_cut_off_and_addresses_without_bytes_are_left_out() -> None:
    sealed = seal_record(
        SIGNER.peer_id, 1, [f"{ADDRESSES[0]}/p2p/{SIGNER.peer_id}", "/memory/1", ADDRESSES[0]], SIGNER.sign
    )
    assert open_record(sealed).addresses == ADDRESSES[:1]


def test_a_record_has_a_bounded_number_of_addresses() -> None:
    many = [f"/ip4/10.0.0.{n}/tcp/1" for n in range(MAX_ADDRESSES + 5)]
    assert open_record(seal_record(SIGNER.peer_id, 1, many, SIGNER.sign)).addresses == tuple(many[:MAX_ADDRESSES])


def test_a_record_of_another_peer_under_our_key_is_refused() -> None:
    with pytest.raises(ManifestInvalid):
        open_record(seal_record(OTHER.peer_id, 1, ADDRESSES, SIGNER.sign))
    record = TheirRecord(ID.from_string(OTHER.peer_id), [Multiaddr(ADDRESSES[0])], 3)
    with pytest.raises(ManifestInvalid):
        open_record(their_seal(record, Ed25519PrivateKey.from_bytes(SIGNER.private_bytes)).marshal_envelope())


def test_a_record_that_is_too_large_is_refused_unread() -> None:
    names = [f"/dns4/{'n' * 240}{n}/tcp/1" for n in range(MAX_ADDRESSES)]
    sealed = seal_record(SIGNER.peer_id, 1, names, SIGNER.sign)
    assert len(sealed) > MAX_RECORD_BYTES
    with pytest.raises(ManifestInvalid):
        open_record(sealed)


@given(st.data())
def test_no_flipped_bit_changes_what_a_record_says(data: st.DataObject) -> None:
    flipped = bytearray(SEALED)
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ManifestInvalid):
        assert open_record(bytes(flipped)) == open_record(SEALED)


@given(st.integers(0, len(SEALED) - 1))
def test_a_record_cut_short_is_refused(length: int) -> None:
    with pytest.raises(ManifestInvalid):
        open_record(SEALED[:length])


@given(st.binary(max_size=400))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        open_record(garbage)
