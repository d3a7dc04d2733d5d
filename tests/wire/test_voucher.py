"""Vouchers: who vouches for whom, for how long, and nothing else."""

from __future__ import annotations

import pytest

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.signed import STATUS_DOMAIN, sign
from meshmax.wire.voucher import (
    CLOCK_TOLERANCE_S,
    MAX_VOUCHER_BYTES,
    VALID_S,
    VOUCHER_DOMAIN,
    Voucher,
    decode_voucher,
    encode_voucher,
    plain_ip,
    sign_voucher,
    verify_voucher,
    vouches,
)

OBSERVER, PEER, OTHER = SeededSigner(1), SeededSigner(2), SeededSigner(3)
IP, NOW = "81.2.69.142", 1_800_000_000.5


def given(ip: str = IP, peer: PeerId = PEER.peer_id, at: float = NOW, by: SeededSigner = OBSERVER) -> Signed:
    return sign_voucher(peer, ip, at, by.peer_id, by.sign)


def test_a_voucher_is_the_bytes_that_it_was() -> None:
    assert VOUCHER_DOMAIN == b"meshmax/voucher/1\n"
    encoded = encode_voucher(given())
    assert encoded[96:].hex().startswith("a36269706b38312e322e36392e31343267706565725f6964")
    assert decode_voucher(encoded) == given()
    assert verify_voucher(decode_voucher(encoded), NOW) == Voucher(PEER.peer_id, IP, int(NOW))


def test_it_names_the_address_in_its_usual_form() -> None:
    assert verify_voucher(given("::ffff:81.2.69.142"), NOW).ip == IP
    assert verify_voucher(given("FE80:0::1%eth0"), NOW).ip == "fe80::1"
    with pytest.raises(InvalidRequest):
        given("localhost")
    assert plain_ip("2A00:0:0::1") == "2a00::1"


@pytest.mark.parametrize(
    ("offset_s", "counts"),
    [(0, True), (VALID_S - 1, True), (VALID_S, False), (-CLOCK_TOLERANCE_S, True), (-CLOCK_TOLERANCE_S - 1, False)],
)
def test_it_counts_for_an_hour(offset_s: float, counts: bool) -> None:
    known = {OBSERVER.peer_id}
    assert vouches(PEER.peer_id, IP, [given(at=NOW)], known, int(NOW) + offset_s) is counts


@pytest.mark.parametrize(
    "voucher",
    [
        given(ip="81.2.69.143"),
        given(peer=OTHER.peer_id),
        given(by=OTHER),  # nobody that we know
        given(by=PEER),  # the peer for itself
        Signed(OBSERVER.peer_id, given().payload, given(by=OTHER).signature),
        Signed(OBSERVER.peer_id, given(ip="1.2.3.4").payload, given().signature),
        sign(STATUS_DOMAIN, Voucher(PEER.peer_id, IP, int(NOW)), OBSERVER.peer_id, OBSERVER.sign),
        sign(VOUCHER_DOMAIN, Voucher(PEER.peer_id, "::ffff:81.2.69.142", int(NOW)), OBSERVER.peer_id, OBSERVER.sign),
        sign(VOUCHER_DOMAIN, Voucher(PeerId("nobody"), IP, int(NOW)), OBSERVER.peer_id, OBSERVER.sign),
        sign(VOUCHER_DOMAIN, Voucher(PEER.peer_id, "x" * 45, int(NOW)), OBSERVER.peer_id, OBSERVER.sign),
        Signed(OBSERVER.peer_id, b"\xff" * 20, OBSERVER.sign(VOUCHER_DOMAIN + b"\xff" * 20)),
    ],
)
def test_what_is_not_said_by_a_known_observer_of_this_peer_and_address_does_not_count(voucher: Signed) -> None:
    known = {OBSERVER.peer_id, PEER.peer_id}
    assert not vouches(PEER.peer_id, IP, [voucher], known, NOW)
    assert vouches(PEER.peer_id, IP, [voucher, given()], known, NOW)


def test_an_address_that_is_none_is_vouched_for_by_nobody() -> None:
    assert not vouches(PEER.peer_id, "here", [given()], {OBSERVER.peer_id}, NOW)


def test_every_truncation_and_bit_flip_is_refused() -> None:
    encoded = encode_voucher(given())
    assert len(encoded) <= MAX_VOUCHER_BYTES
    known = {OBSERVER.peer_id}
    for length in range(len(encoded)):
        try:
            assert not vouches(PEER.peer_id, IP, [decode_voucher(encoded[:length])], known, NOW)
        except ManifestInvalid:
            continue
    for bit in range(0, len(encoded) * 8, 5):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not vouches(PEER.peer_id, IP, [decode_voucher(bytes(flipped))], known, NOW)


def test_one_that_is_too_long_is_no_voucher() -> None:
    with pytest.raises(ManifestInvalid):
        decode_voucher(b"x" * (MAX_VOUCHER_BYTES + 1))
    with pytest.raises(ManifestInvalid):
        encode_voucher(Signed(OBSERVER.peer_id, b"x" * MAX_VOUCHER_BYTES, b"y" * 64))
