"""A mesh with a root and members, for tests: keys from small numbers, certificates and revocations made by hand."""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.membership import SCOPES, Certificate, Chain, MeshId, Revocation, RevocationNotice, Scope
from meshmax.base.model import Signed
from meshmax.core.chains import CERTIFICATE_S
from meshmax.wire.membership import ordered, sign_certificate, sign_revocation

NOW_S = 1_800_000_000


class Key:
    """A key made from a number."""

    def __init__(self, number: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        self.peer_id: PeerId = peer_id_of(self._key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


ROOT = Key(200)
MESH = MeshId(ROOT.peer_id)
A, B, C, D, E = (Key(number) for number in range(1, 6))


def certificate(
    holder: Key,
    issuer: Key = ROOT,
    scopes: Iterable[Scope] = SCOPES,
    issued_at_s: int = NOW_S,
    life_s: int = CERTIFICATE_S,
    mesh: MeshId = MESH,
    serial: int = 1,
) -> Signed:
    word = Certificate(mesh, holder.peer_id, ordered(scopes), serial, issued_at_s, issued_at_s + life_s)
    return sign_certificate(word, issuer.peer_id, issuer.sign)


def chain_of(*holders: Key, scopes: Iterable[Scope] = SCOPES) -> Chain:
    """The first one's chain; each was admitted by the next, the last by the root."""
    issuers = (*holders[1:], ROOT)
    return tuple(certificate(holder, issuer, scopes) for holder, issuer in zip(holders, issuers, strict=True))


def notice(
    target: Key | PeerId, by: Key = ROOT, at_s: int = NOW_S, chain: Chain = (), mesh: MeshId = MESH
) -> RevocationNotice:
    peer_id = target.peer_id if isinstance(target, Key) else target
    return RevocationNotice(sign_revocation(Revocation(mesh, peer_id, at_s), by.peer_id, by.sign), chain)
