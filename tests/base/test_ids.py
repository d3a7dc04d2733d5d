"""Identifiers: PeerIds hold their public key, digests are 64 hexadecimal digits."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId, parse_map_address, parse_peer_id, parse_sha256, peer_id_of, public_key_of


def test_the_public_key_can_be_read_from_a_peer_id() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    peer = peer_id_of(key)
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key


@given(st.text(max_size=80))
def test_any_other_text_is_refused_as_a_peer_id(text: str) -> None:
    try:
        peer = parse_peer_id(text)
    except InvalidRequest:
        return
    assert peer_id_of(public_key_of(peer)) == PeerId(text)


@pytest.mark.parametrize("text", ["sha256:" + "a" * 64, "sha256-" + "a" * 64, "a" * 64])
def test_a_digest_is_read_with_and_without_its_prefix(text: str) -> None:
    assert parse_sha256(text) == "a" * 64


@pytest.mark.parametrize(
    "text", ["", "a" * 63, "A" * 64, "g" * 64, "sha512:" + "a" * 64, "a" * 64 + "\n", "../" + "a" * 61]
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_sha256(text)
    with pytest.raises(InvalidRequest):
        parse_map_address(text)
