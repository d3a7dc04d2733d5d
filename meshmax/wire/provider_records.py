"""Provider records as bytes: signed by the provider, compact, checked whenever they come from outside.

A record is a `Signed` in its own domain. Its payload is a canonical CBOR array of key, sequence, times and addresses; who
provides is the signer, so the name cannot differ. Encoded for a datagram: public key 32, signature 64, payload. Rules: at
most MAX_RECORD_BYTES encoded; it lives MAX_TTL_S at most; issued at most CLOCK_TOLERANCE_S in the future; addresses are
short printable texts. Not here: which records are kept (core.provider_records).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final

import msgspec

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import PeerId, peer_id_of, public_key_of
from meshmax.base.model import Signed
from meshmax.base.providers import KEY_BYTES, MAX_RECORD_ADDRESSES, MAX_RECORD_BYTES, ProviderRecord
from meshmax.wire.dht import Verify, verify_ed25519
from meshmax.wire.signed import canonical, decode_canonical

DOMAIN: Final = b"meshmax/provider-record/1\n"
MAX_TTL_S: Final = 24 * 3600  # a provider that left is forgotten within a day, whatever it claimed
CLOCK_TOLERANCE_S: Final = 300  # between honest clocks
MAX_ADDRESS: Final = 200  # characters of a multiaddr; a relayed one has about 100
_PUBLIC_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_FRONT: Final = _PUBLIC_KEY_BYTES + _SIGNATURE_BYTES

_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ADDRESS)]


class _Payload(msgspec.Struct, frozen=True, array_like=True):
    key: _Key
    sequence: _Number
    issued_at_s: _Number
    expires_at_s: _Number
    addresses: Annotated[tuple[_Address, ...], msgspec.Meta(max_length=MAX_RECORD_ADDRESSES)]


def sign_record(record: ProviderRecord, sign_bytes: Callable[[bytes], bytes]) -> Signed:
    """``record`` signed by the peer that it names. Addresses that do not fit are left out, the last ones first."""
    addresses = list(dict.fromkeys(record.addresses))[:MAX_RECORD_ADDRESSES]
    while True:
        payload = canonical(_payload(record, addresses))
        if len(payload) <= MAX_RECORD_BYTES - _FRONT or not addresses:
            return Signed(record.peer_id, payload, sign_bytes(DOMAIN + payload))
        addresses.pop()


def verify_record(signed: Signed, now_s: float, verify: Verify = verify_ed25519) -> ProviderRecord:
    """The record inside, if it is valid at ``now_s`` (Unix). Raises ManifestInvalid that says why not.

    A withdrawal (no addresses) is valid although it has expired, as long as what it withdraws may live.
    """
    try:
        public_key = public_key_of(signed.signer)
    except InvalidRequest:
        raise ManifestInvalid("a provider record is signed by nobody") from None
    return _checked(public_key, signed.signer, signed.payload, signed.signature, now_s, verify)


def encode_record(signed: Signed) -> bytes:
    """For a datagram or a file. Raises ManifestInvalid if it is too large."""
    encoded = public_key_of(signed.signer) + signed.signature + signed.payload
    if len(encoded) > MAX_RECORD_BYTES or len(signed.signature) != _SIGNATURE_BYTES:
        raise ManifestInvalid(f"a provider record is over the limit of {MAX_RECORD_BYTES} bytes")
    return encoded


def decode_record(encoded: bytes, now_s: float, verify: Verify = verify_ed25519) -> tuple[ProviderRecord, Signed]:
    """The record and its signed form. Raises ManifestInvalid as `verify_record`."""
    if not _FRONT < len(encoded) <= MAX_RECORD_BYTES:
        raise ManifestInvalid("a provider record is too short or too long")
    public_key, signature, payload = encoded[:32], encoded[32:_FRONT], encoded[_FRONT:]
    peer_id = peer_id_of(public_key)
    return _checked(public_key, peer_id, payload, signature, now_s, verify), Signed(peer_id, payload, signature)


def is_withdrawal(record: ProviderRecord) -> bool:
    """Whether it takes back what the provider announced under this key."""
    return not record.addresses


def _payload(record: ProviderRecord, addresses: Sequence[str]) -> _Payload:
    return _Payload(record.key, record.sequence, record.issued_at_s, record.expires_at_s, tuple(addresses))


def _checked(
    public_key: bytes, peer_id: PeerId, payload: bytes, signature: bytes, now_s: float, verify: Verify
) -> ProviderRecord:
    if len(payload) > MAX_RECORD_BYTES - _FRONT or len(signature) != _SIGNATURE_BYTES:
        raise ManifestInvalid("a provider record is too large")
    word = decode_canonical(payload, _Payload)  # first, since it is cheaper than the signature
    if word.issued_at_s > now_s + CLOCK_TOLERANCE_S:
        raise ManifestInvalid("a provider record is of the future: a clock is wrong, here or at its provider")
    if not word.issued_at_s <= word.expires_at_s <= word.issued_at_s + MAX_TTL_S:
        raise ManifestInvalid(f"a provider record lives {MAX_TTL_S // 3600} hours at most")
    if (word.expires_at_s if word.addresses else word.issued_at_s + MAX_TTL_S) <= now_s:
        raise ManifestInvalid("a provider record has expired")
    if not all(address.isascii() and address.isprintable() for address in word.addresses):
        raise ManifestInvalid("a provider record has addresses that are none")
    if not verify(public_key, signature, DOMAIN + payload):
        raise ManifestInvalid("a provider record does not carry the signature of its provider")
    return ProviderRecord(word.key, peer_id, word.sequence, word.issued_at_s, word.expires_at_s, word.addresses)
