"""Multiaddrs in bytes: the same as another library writes them, and nothing strange comes through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from meshmax.base.errors import InvalidRequest
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.multiaddr import (
    MAX_COMPONENTS,
    encode_multiaddr,
    peer_id_bytes,
    peer_id_from_bytes,
    try_decode_multiaddr,
)

PEER, RELAY = SeededSigner(1).peer_id, SeededSigner(2).peer_id
TEXTS = [
    "/ip4/192.168.1.5/tcp/11435",
    f"/ip4/192.168.1.5/tcp/11435/p2p/{PEER}",
    "/ip6/fd00::5/tcp/1",
    "/ip6zone/eth0/ip6/fe80::1/tcp/65535",
    "/dns4/host.example/tcp/443",
    "/dns6/host.example/tcp/443",
    "/dns/host-1.example/tcp/443",
    f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_address_has_the_bytes_that_another_library_gives_it(text: str) -> None:
    assert encode_multiaddr(text) == Multiaddr(text).to_bytes()
    assert try_decode_multiaddr(encode_multiaddr(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "ip4/1.2.3.4/tcp/1", "/ip4/1.2.3/tcp/1", "/ip4/1.2.3.4/tcp", "/ip4/1.2.3.4/tcp/65536", "/udp/1/quic",
     "/ip4/1.2.3.4/tcp/٣", "/dns4/a b/tcp/1", f"/dns4/{'a' * 254}/tcp/1", "/p2p/nobody", "/dns4//tcp/1"],
)  # fmt: skip
def test_what_is_no_address_of_ours_has_no_bytes(text: str) -> None:
    with pytest.raises(InvalidRequest):
        encode_multiaddr(text)


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/udp/4001/quic-v1", "/ip4/1.2.3.4/tcp/80/ws"])
def test_an_address_of_another_transport_has_no_text(text: str) -> None:
    assert try_decode_multiaddr(Multiaddr(text).to_bytes()) is None


def test_an_endless_address_has_no_text() -> None:
    assert try_decode_multiaddr(encode_multiaddr("/ip4/1.2.3.4") * (MAX_COMPONENTS + 1)) is None


@given(st.binary(max_size=600))
def test_garbage_has_no_text_or_one_with_the_same_bytes(garbage: bytes) -> None:
    text = try_decode_multiaddr(garbage)
    assert text is None or encode_multiaddr(text) == garbage


def test_a_peer_id_and_its_bytes_are_one() -> None:
    assert peer_id_from_bytes(peer_id_bytes(PEER)) == PEER
    for wrong in (b"", bytes(38), peer_id_bytes(PEER)[:-1], bytes(1 << 16)):
        with pytest.raises(InvalidRequest):
            peer_id_from_bytes(wrong)
