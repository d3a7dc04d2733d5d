"""Revocations: which certificates of a mesh are void, from signed notices that arrive in any order.

Rules: the root may revoke anybody. A member with the scope admin may revoke anybody but those through whom it was admitted
itself (its certificate, valid at the time that the notice names, comes with it). Notices of equals all count, so that their order
does not matter and nobody is let in again by a date set back: two admins can throw each other out, and the root's word repairs
it. What an admin revoked *after* the root revoked it counts for nothing; what it revoked before stays. The newest notice of a
peer by one signer replaces older ones. Certificates are short-lived, so a notice that is older than the longest certificate voids
nothing any more and is dropped. Not here: who asks (core.membership), how notices spread (services.membership).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import msgspec

from meshmax.base.errors import IntegrityError, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_REVOCATIONS, Certificate, Chain, MeshId, Revocation, RevocationNotice
from meshmax.core.chains import CLOCK_TOLERANCE_S, MAX_CERTIFICATE_S, check_times, has_scope, read_chain
from meshmax.wire.membership import notice_digest, read_revocation
from meshmax.wire.signed import canonical

MAX_BY_ONE: Final = 512  # notices of one admin, so that one gone bad does not push out everybody else's
MAX_AGE_S: Final = MAX_CERTIFICATE_S + 2 * CLOCK_TOLERANCE_S


class _Entry(msgspec.Struct, frozen=True):
    """A notice that was verified: ``issuers`` are the certificates of who signed it."""

    revocation: Revocation
    issuer: PeerId
    issuers: tuple[Certificate, ...]
    notice: RevocationNotice
    encoded: bytes

    def rank(self, root: PeerId) -> tuple[bool, int, bytes]:
        """Which of two stays where there is room for one: the same for everybody."""
        return self.issuer == root, self.revocation.issued_at_s, self.encoded


class Revocations:
    """The notices of ``mesh`` that this node knows."""

    def __init__(self, mesh: MeshId) -> None:
        self._mesh = mesh
        self._root = PeerId(mesh)
        self._entries: dict[PeerId, dict[PeerId, _Entry]] = {}  # by peer, then by who signed
        self._encoded: set[bytes] = set()  # of all entries
        self._by_issuer: Counter[PeerId] = Counter()

    def add(self, notices: Iterable[RevocationNotice], now_s: float) -> tuple[RevocationNotice, ...]:
        """Take in what is valid and new; what was, to be kept and passed on. The rest is dropped without a word."""
        self._expire(now_s)
        return tuple(notice for notice in notices if self._add(notice, now_s))

    def check(self, notice: RevocationNotice, now_s: float) -> Revocation:
        """What ``notice`` says, if its signer may say so. Raises NotAMember, ManifestInvalid."""
        return self._read(notice, now_s).revocation

    def revoked_at_s(self, peer_id: PeerId) -> int | None:
        """Certificates of the peer that were issued then or before are void; None if none is."""
        times = [
            entry.revocation.issued_at_s for entry in self._entries.get(peer_id, {}).values() if self._counts(entry)
        ]
        return max(times, default=None)

    def voids(self, certificate: Certificate) -> bool:
        """Whether ``certificate`` is revoked."""
        at_s = self.revoked_at_s(certificate.peer_id)
        return at_s is not None and certificate.issued_at_s <= at_s

    def notices(self) -> tuple[RevocationNotice, ...]:
        """All that are known, newest first."""
        entries = sorted(self._all(), key=lambda entry: (-entry.revocation.issued_at_s, entry.encoded))
        return tuple(entry.notice for entry in entries)

    def about(self, peers: Iterable[PeerId]) -> tuple[RevocationNotice, ...]:
        """Those that revoke one of ``peers``: what such a peer is told of why it is refused."""
        return tuple(entry.notice for peer_id in set(peers) for entry in self._entries.get(peer_id, {}).values())

    def peers(self) -> tuple[PeerId, ...]:
        """Those that are revoked."""
        return tuple(peer_id for peer_id in self._entries if self.revoked_at_s(peer_id) is not None)

    def digest(self) -> bytes:
        """`wire.membership.notice_digest` of all that are known."""
        return notice_digest(self.notices())

    def _read(self, notice: RevocationNotice, now_s: float) -> _Entry:
        revocation = read_revocation(notice.revocation)
        issuer, at_s = notice.revocation.signer, revocation.issued_at_s
        if revocation.mesh != self._mesh:
            raise NotAMember("the revocation is of another mesh")
        if at_s > now_s + CLOCK_TOLERANCE_S:
            raise NotAMember("the revocation is of the future: check the clocks of this machine and of who revoked")
        issuers: tuple[Certificate, ...] = ()
        if issuer != self._root:
            issuers = self._issuers(notice.chain, issuer, revocation)
        elif notice.chain:
            raise NotAMember("the root needs no certificate to revoke")
        return _Entry(revocation, issuer, issuers, notice, canonical(notice))

    def _issuers(self, chain: Chain, issuer: PeerId, revocation: Revocation) -> tuple[Certificate, ...]:
        issuers = read_chain(chain, self._mesh, issuer)
        if not has_scope(issuers, "admin"):
            raise NotAMember("the revocation is signed by a member without the scope admin")
        check_times(issuers, revocation.issued_at_s)
        if any(revocation.peer_id == above.peer_id for above in issuers[1:]):
            raise NotAMember("a member cannot revoke those through whom it was admitted")
        return issuers

    def _add(self, notice: RevocationNotice, now_s: float) -> bool:
        # Before any signature is checked: neighbours send each other all they have, which is the same as a rule.
        if canonical(notice) in self._encoded:
            return False
        try:
            entry = self._read(notice, now_s)
        except (NotAMember, IntegrityError):
            return False
        if entry.revocation.issued_at_s + MAX_AGE_S < now_s:
            return False
        known = self._entries.get(entry.revocation.peer_id, {}).get(entry.issuer)
        if known is not None and known.rank(self._root) >= entry.rank(self._root):
            return False
        if known is not None:
            self._drop(known)
        self._entries.setdefault(entry.revocation.peer_id, {})[entry.issuer] = entry
        self._encoded.add(entry.encoded)
        self._by_issuer[entry.issuer] += 1
        return self._make_room(entry)

    def _make_room(self, newcomer: _Entry) -> bool:
        """Whether ``newcomer`` may stay; drops what is ranked last where there is too much."""
        if newcomer.issuer != self._root and self._by_issuer[newcomer.issuer] > MAX_BY_ONE:
            theirs = [by[newcomer.issuer] for by in self._entries.values() if newcomer.issuer in by]
            return self._drop_last(theirs) is not newcomer
        if len(self._encoded) > MAX_REVOCATIONS:
            return self._drop_last(self._all()) is not newcomer
        return True

    def _all(self) -> list[_Entry]:
        return [entry for by_issuer in self._entries.values() for entry in by_issuer.values()]

    def _drop_last(self, entries: list[_Entry]) -> _Entry:
        last = min(entries, key=lambda entry: entry.rank(self._root))
        self._drop(last)
        return last

    def _drop(self, entry: _Entry) -> None:
        by_issuer = self._entries[entry.revocation.peer_id]
        del by_issuer[entry.issuer]
        self._encoded.remove(entry.encoded)
        self._by_issuer[entry.issuer] -= 1
        if not self._by_issuer[entry.issuer]:
            del self._by_issuer[entry.issuer]
        if not by_issuer:
            del self._entries[entry.revocation.peer_id]

    def _expire(self, now_s: float) -> None:
        for entry in self._all():
            if entry.revocation.issued_at_s + MAX_AGE_S < now_s:
                self._drop(entry)

    def _counts(self, entry: _Entry) -> bool:
        """Whether who signed it had not been revoked by the root before."""
        for above in entry.issuers:
            by_root = self._entries.get(above.peer_id, {}).get(self._root)
            if by_root and above.issued_at_s <= by_root.revocation.issued_at_s < entry.revocation.issued_at_s:
                return False
        return True
