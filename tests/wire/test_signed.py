"""Signed words: only the signer's own bytes, of the same kind, in canonical form, are believed."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import MapAddress, Sha256, peer_id_of
from meshmax.base.model import ModelRecord, Signed
from meshmax.wire.signed import (
    MAX_PAYLOAD_BYTES,
    MODEL_RECORD_DOMAIN,
    STATUS_DOMAIN,
    canonical,
    decode_canonical,
    sign,
    verify,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PEER = peer_id_of(KEY.public_key().public_bytes_raw())
RECORD = ModelRecord("h/n/m:t", Sha256("a" * 64), {Sha256("b" * 64): MapAddress("c" * 64)}, PEER, 1, 2)


def test_a_signed_record_is_believed() -> None:
    signed = sign(MODEL_RECORD_DOMAIN, RECORD, PEER, KEY.sign)
    assert verify(MODEL_RECORD_DOMAIN, signed, ModelRecord) == RECORD


def test_the_bytes_that_are_signed_are_fixed() -> None:
    small = ModelRecord("n", Sha256("a"), {}, PEER, 1, 2)
    assert canonical(small).startswith(bytes.fromhex("a6646e616d65616e"))


def test_bytes_of_one_kind_are_not_believed_as_another() -> None:
    with pytest.raises(ManifestInvalid, match="signature"):
        verify(STATUS_DOMAIN, sign(MODEL_RECORD_DOMAIN, RECORD, PEER, KEY.sign), ModelRecord)


def test_somebody_elses_signature_is_not_believed() -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
    with pytest.raises(ManifestInvalid, match="signature"):
        verify(MODEL_RECORD_DOMAIN, sign(MODEL_RECORD_DOMAIN, RECORD, PEER, other.sign), ModelRecord)


def test_every_flipped_bit_is_found() -> None:
    signed = sign(MODEL_RECORD_DOMAIN, RECORD, PEER, KEY.sign)
    for bit in range(0, 8 * len(signed.payload), 3):
        changed = bytearray(signed.payload)
        changed[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(ManifestInvalid):
            verify(MODEL_RECORD_DOMAIN, msgspec.structs.replace(signed, payload=bytes(changed)), ModelRecord)


def test_bytes_that_are_not_in_canonical_form_are_refused() -> None:
    with pytest.raises(ManifestInvalid, match="canonical"):
        decode_canonical(b"\x18\x01", int)  # 1 written in two bytes


def test_every_truncation_of_canonical_bytes_is_refused() -> None:
    data = canonical(RECORD)
    for end in range(len(data)):
        with pytest.raises(ManifestInvalid):
            decode_canonical(data[:end], ModelRecord)


def test_an_oversized_record_or_a_signer_that_is_no_peer_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="too large"):
        verify(STATUS_DOMAIN, Signed(PEER, bytes(MAX_PAYLOAD_BYTES + 1), bytes(64)), ModelRecord)
    with pytest.raises(ManifestInvalid):
        verify(STATUS_DOMAIN, Signed(PEER[:-1], b"", bytes(64)), ModelRecord)  # type: ignore[arg-type]
