"""Membership of one mesh: who is a member now, what certificates are made out for, and when ours is renewed.

Rules: a peer is a member while its chain leads to the root, is in time, and no certificate of it is revoked. So a certificate
that a revoked admin issued is worth nothing any more: its dates are that admin's word. A certificate has no more scopes than its
issuer and at most 30 days; if the peer was revoked, it is made out from after that (who invites it again means it). It is
renewed from a third of its life on, so that a chain outlives an issuer that is away for weeks, and by whom may give it all its
scopes. Not here: signatures (wire.membership), chains (core.chains), revocations (core.revocations), tickets (core.tickets), who
is asked (services.membership).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from meshmax.base.errors import InvalidRequest, NotAMember, OutOfScope
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_CHAIN, MAX_MESH_NAME, Certificate, Chain, MeshId, RevocationNotice, Scope
from meshmax.core.chains import CERTIFICATE_S, check_times, read_chain, summary
from meshmax.core.revocations import Revocations
from meshmax.wire.membership import ordered

RENEW_FROM: Final = 1 / 3  # of a certificate's life
RENEW_SPREAD: Final = 0.1  # of its life: members that joined together do not all ask at once
RENEW_AGAIN_S: Final = 600.0  # after nobody could renew it
MIN_RENEW_S: Final = 60.0  # between two renewals, however short lives get


class Membership:
    """What this node knows of who is a member of ``mesh``. ``notices``: what was kept."""

    def __init__(self, mesh: MeshId, notices: Iterable[RevocationNotice] = (), now_s: float = 0.0) -> None:
        self.mesh = mesh
        self.revocations = Revocations(mesh)
        self.revocations.add(notices, now_s)

    def verify(self, chain: Chain, peer_id: PeerId, now_s: float) -> Certificate:
        """What ``peer_id``, whom the connection has proved, may do now and until when, by all of its chain.

        Raises NotAMember with a sentence that may be told to both ends.
        """
        certificates = read_chain(chain, self.mesh, peer_id)
        self._check_revoked(certificates)
        check_times(certificates, now_s)
        return summary(certificates)

    def revoke(self, notices: Iterable[RevocationNotice], now_s: float) -> tuple[RevocationNotice, ...]:
        """Take in revocations; those that are new are to be kept and passed on, and who is connected is verified again."""
        return self.revocations.add(notices, now_s)

    def issue(
        self,
        peer_id: PeerId,
        scopes: Sequence[Scope],
        now_s: float,
        *,
        issuer: Chain,
        issuer_id: PeerId,
        serial: int = 0,
    ) -> Certificate:
        """The certificate to sign for ``peer_id``.

        ``issuer``: the chain of who signs, () for the root; ``serial``: of the peer's last certificate, as far as known.
        Raises OutOfScope (the issuer may not admit, or not with all of ``scopes``), NotAMember (it is no member itself).
        """
        expires_at_s = int(now_s) + CERTIFICATE_S
        if issuer:
            own = self.verify(issuer, issuer_id, now_s)
            _check_may_issue(own, scopes)
            if len(issuer) >= MAX_CHAIN:
                raise OutOfScope(f"a member that is {MAX_CHAIN} steps away from the mesh's root cannot admit others")
            expires_at_s = min(expires_at_s, own.expires_at_s)
        elif issuer_id != PeerId(self.mesh):
            raise OutOfScope("only the mesh's root issues without a certificate")
        if not scopes:
            raise InvalidRequest("a certificate needs a scope")
        revoked_at_s = self.revocations.revoked_at_s(peer_id)
        issued_at_s = max(int(now_s), -1 if revoked_at_s is None else revoked_at_s + 1)
        return Certificate(
            self.mesh, peer_id, ordered(scopes), serial + 1, issued_at_s, max(expires_at_s, issued_at_s + 1)
        )

    def _check_revoked(self, certificates: Sequence[Certificate]) -> None:
        for index, certificate in enumerate(certificates):
            if self.revocations.voids(certificate):
                raise NotAMember(
                    "the certificate was issued by a member that was revoked: join again with a new ticket"
                    if index
                    else "the certificate was revoked"
                )


def _check_may_issue(own: Certificate, scopes: Sequence[Scope]) -> None:
    if "admin" not in own.scopes:
        raise OutOfScope("only a member with the scope admin admits others")
    if lacking := [scope for scope in ordered(scopes) if scope not in own.scopes]:
        raise OutOfScope(f"nobody can give what it has not: the scope {', '.join(lacking)} is lacking here")


def may_renew(own: Certificate, other: Certificate) -> bool:
    """Whether the member with ``other`` can renew ``own`` without taking a scope from it."""
    return "admin" in other.scopes and set(own.scopes) <= set(other.scopes)


def is_better(own: Certificate, offered: Certificate) -> bool:
    """Whether to take ``offered`` in place of ``own``, both as `Membership.verify` returned them."""
    return offered.expires_at_s > own.expires_at_s and set(own.scopes) <= set(offered.scopes)


def renew_at_s(own: Certificate, random: Any) -> float:
    """When to renew ``own`` (as `Membership.verify` returned it), Unix seconds. ``random``: a random.Random."""
    life_s = own.expires_at_s - own.issued_at_s
    share = RENEW_FROM + float(random.random()) * RENEW_SPREAD
    return own.issued_at_s + max(MIN_RENEW_S, life_s * share)


def check_mesh_name(name: str) -> str:
    """``name`` without blanks around it. Raises InvalidRequest that says what is accepted."""
    name = name.strip()
    if not 0 < len(name) <= MAX_MESH_NAME or not name.isprintable():
        raise InvalidRequest(f"a mesh's name has 1 to {MAX_MESH_NAME} printable characters")
    return name


def shown_mesh_name(*told: str) -> str:
    """The first of the names that others told that can be shown; what they call it decides nothing."""
    for name in told:
        try:
            return check_mesh_name(name)
        except InvalidRequest:
            continue
    return "unnamed"


def parse_scopes(text: str) -> tuple[Scope, ...]:
    """Scopes in ``text``, comma separated. Raises InvalidRequest that says what is accepted."""
    words = {word.strip().lower() for word in text.split(",") if word.strip()}
    known: dict[str, Scope] = {"infer": "infer", "pull": "pull", "admin": "admin"}
    if not words or not words <= known.keys():
        raise InvalidRequest(
            "scopes are infer (have prompts answered), pull (be sent models) and admin (admit and revoke others), comma separated"
        )
    return ordered(known[word] for word in words)
