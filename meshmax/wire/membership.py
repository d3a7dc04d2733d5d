"""Membership in bytes: certificates and revocations as they are signed, the messages of MEMBER and TICKET, the mesh's tag.

MEMBER (``/meshmax/member/1.0.0``), opened by who dialled. The first message says what the stream is for:

    Tag          admission. The acceptor answers with its own Tag, or a Failure ("not_a_member") where the two differ. In a
                 private mesh the dialler then sends Credentials, and the acceptor, once they are verified, its own. Where their
                 `known` differ, both send Revocations until `last`. Each ends with Welcome or a Failure; before the
                 Failure may come the Revocations that it is about.
    Credentials  of an admitted peer: its certificate was renewed. Answered by Welcome or a Failure.
    Revocations  of an admitted peer: news. Answered by Welcome.

TICKET (``/meshmax/ticket/1.0.0``), open to guests: Redeem or Renew, answered by Issued or a Failure.

Decided here: bounds, domains, what a tag is. The tag hides the mesh: who does not know the mesh's id learns nothing from it, and
it is of one pair of peers and one direction, so that it can be neither replayed nor reflected. Not here: who is believed
(core.membership), a ticket's text (wire.ticket).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from blake3 import blake3

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import PeerId
from meshmax.base.membership import (
    MAX_CHAIN,
    MAX_MESH_NAME,
    SCOPES,
    Certificate,
    MeshId,
    Revocation,
    RevocationNotice,
    Scope,
)
from meshmax.base.model import Signed
from meshmax.base.status import MAX_PEER_NAME
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec
from meshmax.wire.signed import canonical, sign, verify

CERTIFICATE_DOMAIN: Final = b"meshmax/certificate/1\n"
REVOCATION_DOMAIN: Final = b"meshmax/revocation/1\n"
TAG_BYTES: Final = 32
SECRET_BYTES: Final = 16  # of a ticket: 128 random bits, tried over the network only, and each try is a message
DIGEST_BYTES: Final = 32
MAX_SIGNED_BYTES: Final = 512  # of a certificate's or a revocation's payload; the longest has 220
MAX_TIME_S: Final = 1 << 40  # Unix seconds; no clock that was ever right comes near
MAX_SERIAL: Final = 1 << 53
REVOCATIONS_PER_MESSAGE: Final = 64  # each with its chain has at most 4 KB, so a message at most 256 KiB
_MAX_BODY_BYTES: Final = 256 * KIB
_MAX_TICKET_BODY_BYTES: Final = 8 * KIB  # a chain of four certificates of at most 1 KB each, or a Failure

# What a key of BLAKE3 is derived for (BLAKE3's derive_key takes a context that nothing else uses).
_TAG_CONTEXT: Final = "meshmax 2026-11 member tag 1"

Role = Literal["out", "in"]  # who sends the tag: the side that dialled, or the one that accepted

ChainWord = Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_CHAIN)]
Time = Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_S)]


# --- signed words ------------------------------------------------------------------------------------------------------


def sign_certificate(certificate: Certificate, issuer: PeerId, sign_bytes: Callable[[bytes], bytes]) -> Signed:
    """``certificate`` signed by ``issuer``: the mesh's root, or a member that may admit others."""
    return sign(CERTIFICATE_DOMAIN, certificate, issuer, sign_bytes)


def read_certificate(signed: Signed) -> Certificate:
    """The certificate inside, if its signer really signed it and it is within bounds. Raises ManifestInvalid."""
    certificate = verify(CERTIFICATE_DOMAIN, signed, Certificate, MAX_SIGNED_BYTES)
    if certificate.scopes != ordered(certificate.scopes) or not certificate.scopes:
        raise ManifestInvalid("a certificate names its scopes once each, in their order")
    if not 0 <= certificate.issued_at_s < certificate.expires_at_s <= MAX_TIME_S:
        raise ManifestInvalid("a certificate ends before it begins")
    if not 0 <= certificate.serial <= MAX_SERIAL:
        raise ManifestInvalid("a certificate's serial is out of bounds")
    return certificate


def sign_revocation(revocation: Revocation, issuer: PeerId, sign_bytes: Callable[[bytes], bytes]) -> Signed:
    """``revocation`` signed by ``issuer``."""
    return sign(REVOCATION_DOMAIN, revocation, issuer, sign_bytes)


def read_revocation(signed: Signed) -> Revocation:
    """The revocation inside, if its signer really signed it and it is within bounds. Raises ManifestInvalid."""
    revocation = verify(REVOCATION_DOMAIN, signed, Revocation, MAX_SIGNED_BYTES)
    if not 0 <= revocation.issued_at_s <= MAX_TIME_S:
        raise ManifestInvalid("a revocation's time is out of bounds")
    return revocation


def ordered(scopes: Iterable[Scope]) -> tuple[Scope, ...]:
    """``scopes``, each once, in the order of SCOPES."""
    given = set(scopes)
    return tuple(scope for scope in SCOPES if scope in given)


def notice_digest(notices: Iterable[RevocationNotice]) -> bytes:
    """What two peers compare to see whether they know of the same revocations; the order does not matter."""
    hasher = blake3()
    for one in sorted(blake3(canonical(notice)).digest() for notice in notices):
        hasher.update(one)
    return hasher.digest()


# --- the tag -------------------------------------------------------------------------------------------------------------


def mesh_tag(mesh: MeshId, sender: PeerId, receiver: PeerId, role: Role) -> bytes:
    """What ``sender`` shows ``receiver`` to be recognised as a peer of ``mesh`` (the open one, too). Compare in constant time."""
    key = blake3(mesh.encode(), derive_key_context=_TAG_CONTEXT).digest()
    return blake3(b"\n".join((role.encode(), sender.encode(), receiver.encode())), key=key).digest()


# --- messages ------------------------------------------------------------------------------------------------------------


class Tag(msgspec.Struct, frozen=True, tag="tag"):
    """`mesh_tag` of the sender."""

    value: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]


class Credentials(msgspec.Struct, frozen=True, tag="credentials"):
    """The sender's chain, the digest of the revocations that it knows (`notice_digest`), and its clock (Unix seconds)."""

    chain: ChainWord
    known: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    now_s: Time


class Revocations(msgspec.Struct, frozen=True, tag="revocations"):
    """Revocations that the sender knows; ``last`` False where another message follows."""

    notices: Annotated[tuple[RevocationNotice, ...], msgspec.Meta(max_length=REVOCATIONS_PER_MESSAGE)]
    last: bool = True


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """You are admitted; or: heard."""


class Redeem(msgspec.Struct, frozen=True, tag="redeem"):
    """A ticket's secret, from who wants to be a member; ``name`` is what people call it."""

    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    name: Annotated[str, msgspec.Meta(max_length=MAX_PEER_NAME)] = ""

    def __repr__(self) -> str:
        return "Redeem(secret=...)"


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """A member's chain, to be replaced by one that is valid for longer."""

    chain: ChainWord


class Issued(msgspec.Struct, frozen=True, tag="issued"):
    """The asker's new chain, and what the mesh is called."""

    chain: ChainWord
    mesh_name: Annotated[str, msgspec.Meta(max_length=MAX_MESH_NAME)]


MemberMessage: TypeAlias = Tag | Credentials | Revocations | Welcome | Failure
ToIssuer: TypeAlias = Redeem | Renew
FromIssuer: TypeAlias = Issued | Failure

MEMBER: Final[Codec[MemberMessage]] = Codec(MemberMessage, _MAX_BODY_BYTES)
TO_ISSUER: Final[Codec[ToIssuer]] = Codec(ToIssuer, _MAX_TICKET_BODY_BYTES)
FROM_ISSUER: Final[Codec[FromIssuer]] = Codec(FromIssuer, _MAX_TICKET_BODY_BYTES)


def revocation_messages(notices: Iterable[RevocationNotice]) -> tuple[Revocations, ...]:
    """``notices`` in as few messages as they fit; one empty message for none."""
    all_notices = tuple(notices)
    size = REVOCATIONS_PER_MESSAGE
    parts = [all_notices[at : at + size] for at in range(0, len(all_notices), size)] or [()]
    return tuple(Revocations(part, last=index == len(parts) - 1) for index, part in enumerate(parts))
