"""Vouchers: an observer's signed word that a peer came to it from an IP address.

A peer shows them to whom it asks to send packets to a public address of its own, so that nobody can have others knock at a
stranger's door. Rules: a `Signed` in a domain of its own over peer, IP address and Unix time, at most MAX_VOUCHER_BYTES
encoded; it counts for VALID_S, from CLOCK_TOLERANCE_S before it was issued. What it is worth depends on who signed it: only
observers that the reader knows by itself count. Not here: which candidates follow (core.candidates), fetching
(services.reachability).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Final

import msgspec

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import PeerId, parse_peer_id, peer_id_of, public_key_of
from meshmax.base.model import Signed
from meshmax.wire.signed import sign, verify

VOUCHER_DOMAIN: Final = b"meshmax/voucher/1\n"
VALID_S: Final = 3600  # home connections change their address about once a day
CLOCK_TOLERANCE_S: Final = 300  # between honest clocks
MAX_VOUCHER_BYTES: Final = 256  # public key 32, signature 64, some 100 of CBOR
_FRONT: Final = 96


class Voucher(msgspec.Struct, frozen=True):
    """``peer_id`` came to the signer from ``ip`` (canonical, without zone) at ``issued_at_s`` (Unix)."""

    peer_id: PeerId
    ip: Annotated[str, msgspec.Meta(min_length=2, max_length=45)]
    issued_at_s: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]


def sign_voucher(
    peer_id: PeerId, ip: str, unix_s: float, signer: PeerId, sign_bytes: Callable[[bytes], bytes]
) -> Signed:
    """The word of ``signer``, whose key ``sign_bytes`` uses. Raises InvalidRequest: ``ip`` is no IP address."""
    return sign(VOUCHER_DOMAIN, Voucher(peer_id, plain_ip(ip), int(unix_s)), signer, sign_bytes)


def verify_voucher(signed: Signed, unix_s: float) -> Voucher:
    """The word inside, if it counts at ``unix_s``. Raises ManifestInvalid that says why not."""
    word = verify(VOUCHER_DOMAIN, signed, Voucher, MAX_VOUCHER_BYTES)
    try:
        parse_peer_id(word.peer_id)
        plain = plain_ip(word.ip)
    except InvalidRequest:
        raise ManifestInvalid("a voucher names no peer or no IP address") from None
    if plain != word.ip:
        raise ManifestInvalid("a voucher names an IP address in another than its usual form")
    if not word.issued_at_s - CLOCK_TOLERANCE_S <= unix_s < word.issued_at_s + VALID_S:
        raise ManifestInvalid("a voucher has expired, or comes from the future")
    return word


def encode_voucher(signed: Signed) -> bytes:
    """Public key, signature, payload. Raises ManifestInvalid if it is too large."""
    encoded = public_key_of(signed.signer) + signed.signature + signed.payload
    if len(encoded) > MAX_VOUCHER_BYTES or len(signed.signature) != 64:
        raise ManifestInvalid(f"a voucher is over the limit of {MAX_VOUCHER_BYTES} bytes")
    return encoded


def decode_voucher(encoded: bytes) -> Signed:
    """What `encode_voucher` made; nothing is verified yet. Raises ManifestInvalid."""
    if not _FRONT < len(encoded) <= MAX_VOUCHER_BYTES:
        raise ManifestInvalid("a voucher is too short or too long")
    return Signed(peer_id_of(encoded[:32]), encoded[_FRONT:], encoded[32:_FRONT])


def vouches(
    peer_id: PeerId, ip: str, vouchers: Iterable[Signed], known_observers: Collection[PeerId], unix_s: float
) -> bool:
    """Whether one of ``vouchers``, by a signer in ``known_observers``, says that ``peer_id`` came from ``ip``.

    The peer itself is no witness, even if it is known. Signatures are verified of known observers only.
    """
    try:
        wanted = plain_ip(ip)
    except InvalidRequest:
        return False
    for signed in vouchers:
        if signed.signer == peer_id or signed.signer not in known_observers:
            continue
        try:
            word = verify_voucher(signed, unix_s)
        except ManifestInvalid:
            continue
        if word.peer_id == peer_id and word.ip == wanted:
            return True
    return False


def plain_ip(ip: str) -> str:
    """``ip`` in its usual form, without zone; an IPv4 address that is written as IPv6 as itself. Raises InvalidRequest."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        raise InvalidRequest(f"'{ip[:60]}' is not an IP address") from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
