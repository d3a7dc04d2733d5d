"""Chains of certificates: whether one leads from a peer to the mesh's root, what it allows, and until when.

Rules: each certificate is signed by the holder of the next, whose scopes hold admin; the last is signed by the root. What a chain
allows is what every certificate in it allows, from the latest beginning to the earliest end. Clocks may differ by 5 minutes. A
reason is a sentence that both ends can be told: it names neither the mesh nor its members. Not here: revocations
(core.revocations).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from meshmax.base.errors import ManifestInvalid, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_CHAIN, SCOPES, Certificate, Chain, MeshId, Scope
from meshmax.base.units import format_span
from meshmax.wire.membership import read_certificate

CLOCK_TOLERANCE_S: Final = 300  # clocks of machines that are on time by themselves differ by less
CERTIFICATE_S: Final = 30 * 86400  # a member's; long enough for holidays, short enough to forget who never comes back
MAX_CERTIFICATE_S: Final = CERTIFICATE_S + CLOCK_TOLERANCE_S  # what is accepted


def read_chain(chain: Chain, mesh: MeshId, peer_id: PeerId) -> tuple[Certificate, ...]:
    """The certificates of ``chain``, if it leads from ``peer_id`` to the root of ``mesh``. Raises NotAMember.

    Times are not looked at; see `check_times`.
    """
    if not chain:
        raise NotAMember(
            "no certificate was shown: `meshmax ticket` at a member makes a ticket, `meshmax join` takes it"
        )
    if len(chain) > MAX_CHAIN:
        raise NotAMember(f"the certificate is more than {MAX_CHAIN} steps away from the mesh's root")
    root, holder, certificates = PeerId(mesh), peer_id, []
    for signed in chain:
        if holder == root:
            raise NotAMember("the certificate goes on after the signature of the mesh's root")
        try:
            certificate = read_certificate(signed)
        except ManifestInvalid:
            raise NotAMember("the certificate is damaged or was changed") from None
        if certificate.mesh != mesh:
            raise NotAMember("the certificate is of another mesh")
        if certificate.peer_id != holder:
            raise NotAMember("the certificate belongs to another peer")
        if certificate.expires_at_s - certificate.issued_at_s > MAX_CERTIFICATE_S:
            raise NotAMember("the certificate is made out for longer than certificates may be")
        certificates.append(certificate)
        holder = signed.signer
    if holder != root:
        raise NotAMember("the certificate is not signed by the mesh's root, nor by whom the root allowed to")
    if not has_scope(certificates[1:], "admin"):
        raise NotAMember("the certificate was issued by a member that may not admit others")
    return tuple(certificates)


def has_scope(certificates: Sequence[Certificate], scope: Scope) -> bool:
    """Whether each of them has it."""
    return all(scope in certificate.scopes for certificate in certificates)


def check_times(certificates: Sequence[Certificate], at_s: float) -> None:
    """Raises NotAMember unless each of them is valid at ``at_s`` by a clock that may be off by CLOCK_TOLERANCE_S."""
    begins_s = max(certificate.issued_at_s for certificate in certificates)
    ends_s = min(certificate.expires_at_s for certificate in certificates)
    if at_s < begins_s - CLOCK_TOLERANCE_S:
        early = format_span(begins_s - at_s)
        raise NotAMember(f"the certificate is valid only in {early}: clock off by about {early}?")
    if at_s > ends_s + CLOCK_TOLERANCE_S:
        late = format_span(at_s - ends_s)
        raise NotAMember(
            f"the certificate expired {late} ago: join again with a new ticket, unless the clock is off by about {late}"
        )


def summary(certificates: Sequence[Certificate]) -> Certificate:
    """The holder's certificate as far as all of ``certificates``, its own first, allow it. Raises NotAMember: nothing is left."""
    scopes = tuple(scope for scope in SCOPES if has_scope(certificates, scope))
    if not scopes:
        raise NotAMember("the certificate allows nothing that its issuer may allow")
    ends_s = min(certificate.expires_at_s for certificate in certificates)
    return msgspec.structs.replace(certificates[0], scopes=scopes, expires_at_s=ends_s)


def clock_hint(theirs_s: float, ours_s: float) -> str:
    """A sentence where two clocks differ by more than is borne, else ''."""
    apart_s = abs(theirs_s - ours_s)
    return f"the two clocks differ by {format_span(apart_s)}" if apart_s > CLOCK_TOLERANCE_S else ""
