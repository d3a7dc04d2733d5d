"""Signed words: canonical CBOR under a domain string, Ed25519 by the signer's PeerId.

The signature is over ``domain + payload``; a domain string names the kind and version and ends in a newline, so that no
signed bytes of one kind pass as another. Decoding checks the signature, that the bytes are in canonical form, types and
bounds. Canonical: RFC 8949 section 4.2.1 as cbor2 writes it; a decoder re-encodes and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import cbor2
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import PeerId, public_key_of
from meshmax.base.model import Signed

STATUS_DOMAIN: Final = b"meshmax/status/1\n"
MODEL_RECORD_DOMAIN: Final = b"meshmax/model-record/1\n"
BUNDLE_DOMAIN: Final = b"meshmax/bundle/1\n"
MAX_PAYLOAD_BYTES: Final = 512 << 10  # half a frame: a status with 1024 models, a record with 4096 layers

W = TypeVar("W")


def canonical(value: Any) -> bytes:
    """``value`` (builtins, or Structs of them) as canonical CBOR."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def decode_canonical(data: bytes, word: type[W]) -> W:
    """The ``word`` that ``data`` encodes. Raises ManifestInvalid if it is malformed, not canonical, or of another shape."""
    try:
        value = cbor2.loads(data)
        if cbor2.dumps(value, canonical=True) != data:
            raise ManifestInvalid("signed or addressed bytes are not in canonical form")
        return msgspec.convert(value, word, builtin_types=(bytes,))
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, msgspec.ValidationError) as error:
        raise ManifestInvalid(f"signed or addressed bytes are not valid: {str(error)[:200]}") from None


def sign(domain: bytes, word: Any, signer: PeerId, sign_bytes: Callable[[bytes], bytes]) -> Signed:
    """``word`` signed by ``signer``, whose key ``sign_bytes`` uses."""
    payload = canonical(word)
    return Signed(signer, payload, sign_bytes(domain + payload))


def verify(domain: bytes, signed: Signed, word: type[W], max_bytes: int = MAX_PAYLOAD_BYTES) -> W:
    """The word inside, if its signer really signed it in this domain. Raises ManifestInvalid."""
    if len(signed.payload) > max_bytes or len(signed.signature) != 64:
        raise ManifestInvalid("a signed record is too large, or its signature has a wrong length")
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(signed.signer))
        key.verify(signed.signature, domain + signed.payload)
    except (InvalidSignature, InvalidRequest, ValueError):
        raise ManifestInvalid("a signed record does not carry the signature of its signer") from None
    return decode_canonical(signed.payload, word)
