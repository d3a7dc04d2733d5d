"""The DHT's datagrams: what is taken, that nothing else is, and how long they may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import public_key_of
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.model import Signed
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import dht
from meshmax.wire.dht_chain import decode_chain, encode_chain, open_chain, seal_chain
from meshmax.wire.membership import sign_certificate

SIGNER = SeededSigner(1)
KEY = public_key_of(SIGNER.peer_id)
TAG = dht.overlay_tag(OPEN_MESH)
BODIES: list[dht.Body] = [
    dht.Ping(b"c" * 8, b"h" * 9, True, b"p"),
    dht.Pong(b"c" * 8),
    dht.Find(b"t" * 32, 20, b"a" * 20, b"c" * 8),
    dht.Found((b"n" * 38,), (b"r" * 300,), True, b"c" * 8),
    dht.Store(b"r" * 720, b"c" * 8),
    dht.Stored(True),
    dht.Introduce(b"c" * 8),
]


def datagram(body: dht.Body) -> bytes:
    return dht.encode_datagram(TAG, KEY, b"r" * 20, 1_800_000_000_000, b"12345678", True, body, SIGNER.sign)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_a_datagram_arrives_as_it_was_sent(body: dht.Body) -> None:
    envelope = dht.decode_header(datagram(body))
    assert dht.verified(envelope, dht.verify_ed25519)
    assert dht.decode_body(envelope) == body
    assert (envelope.sender, envelope.receiver, envelope.client) == (KEY, b"r" * 20, True)
    assert envelope.answer == isinstance(body, dht.Pong | dht.Found | dht.Stored | dht.Introduce)


def test_every_flipped_bit_is_seen() -> None:
    good = datagram(BODIES[2])
    for place in range(len(good)):
        broken = bytearray(good)
        broken[place] ^= 1 << place % 8
        try:
            envelope = dht.decode_header(bytes(broken))
        except RemoteProtocolError:
            continue
        assert not dht.verified(envelope, dht.verify_ed25519)


def test_what_is_cut_off_or_too_long_is_refused() -> None:
    good = datagram(BODIES[4])
    for length in range(0, 144, 7):
        with pytest.raises(RemoteProtocolError):
            dht.decode_header(good[:length])
    with pytest.raises(RemoteProtocolError):
        dht.decode_header(good + bytes(1200))


@given(st.binary(max_size=1300))
def test_noise_is_refused_in_words(noise: bytes) -> None:
    try:
        dht.decode_body(dht.decode_header(noise))
    except RemoteProtocolError:
        pass
    else:
        raise AssertionError("noise was taken for a datagram")


def test_no_datagram_is_longer_than_its_limit() -> None:
    assert len(datagram(dht.padded(dht.Find(b"t" * 32)))) <= dht.MAX_DATAGRAM_BYTES
    assert len(datagram(dht.padded(dht.Ping(chain=bytes(900))))) <= dht.MAX_DATAGRAM_BYTES
    with pytest.raises(LocalProtocolError):
        datagram(dht.Ping(pad=bytes(dht.MAX_BODY_BYTES + 1)))


@pytest.mark.parametrize("ip", ["11.2.3.4", "2600::1", "192.168.1.1"])
def test_contacts_arrive_as_they_were_sent(ip: str) -> None:
    contact = dht.Contact(KEY, ip, 11435)
    assert dht.unpack_contact(dht.pack_contact(contact)) == contact
    assert contact.peer_id == SIGNER.peer_id
    assert contact.node_id == dht.node_id_of_peer(SIGNER.peer_id)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        bytes(37),
        bytes(45),
        KEY + b"\0\0" + bytes([11, 1, 1, 1]),
        KEY + b"\1\1" + bytes(4),
        KEY + b"\1\1\xe0\0\0\1",
    ],
)
def test_contacts_that_nobody_can_reach_are_refused(packed: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        dht.unpack_contact(packed)


def test_keys_of_two_meshes_kinds_or_words_differ() -> None:
    keys = {dht.dht_key(MeshId(m), k, w) for m in ("", "a") for k in ("model", "name") for w in ("x", "y")}
    assert len(keys) == 8
    assert all(len(key) == 32 for key in keys)
    assert dht.overlay_tag(MeshId("a")) != dht.overlay_tag(OPEN_MESH)


def test_certificates_arrive_as_they_were_sent() -> None:
    from meshmax.base.membership import Certificate

    word = Certificate(MeshId(SIGNER.peer_id), SeededSigner(2).peer_id, ("infer", "pull"), 1, 5, 9)
    chain = tuple(sign_certificate(word, SIGNER.peer_id, SIGNER.sign) for _ in range(2))
    encoded = encode_chain(chain)
    assert decode_chain(encoded) == chain
    assert decode_chain(b"") == ()
    assert len(encoded) < dht.MAX_CHAIN_BYTES
    for cut in (1, 50, 97, len(encoded) // 2 + 3, len(encoded) - 1):
        with pytest.raises(RemoteProtocolError):
            decode_chain(encoded[:cut])
    with pytest.raises(RemoteProtocolError):
        decode_chain(bytes(98) * 50)


def test_a_sealed_chain_is_read_by_who_knows_the_mesh_and_tells_others_nothing_of_it() -> None:
    root = SeededSigner(9)
    mesh, chain = MeshId(root.peer_id), (Signed(root.peer_id, root.peer_id.encode() * 3, bytes(64)),)
    sealed = seal_chain(mesh, chain)
    assert open_chain(mesh, sealed) == chain
    assert public_key_of(root.peer_id) not in sealed
    assert root.peer_id.encode() not in sealed
    assert seal_chain(mesh, ()) == b""
    for broken in (sealed[:-1], sealed[1:], sealed[:5], b""):
        with pytest.raises(RemoteProtocolError):
            open_chain(mesh, broken)
    with pytest.raises(RemoteProtocolError):
        open_chain(MeshId(SeededSigner(8).peer_id), sealed)
