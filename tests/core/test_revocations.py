"""Revocations: who may revoke whom; their order does not matter; a gone admin can do little; all is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import ManifestInvalid, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId, RevocationNotice
from meshmax.base.model import Signed
from meshmax.core import revocations as module
from meshmax.core.chains import CERTIFICATE_S, CLOCK_TOLERANCE_S
from meshmax.core.revocations import MAX_AGE_S, Revocations
from tests.members import MESH, NOW_S, A, B, C, D, E, Key, certificate, chain_of, notice


def known(*notices: RevocationNotice, now_s: float = NOW_S) -> Revocations:
    revocations = Revocations(MESH)
    revocations.add(notices, now_s)
    return revocations


def test_the_root_revokes_anybody_and_the_newest_wins() -> None:
    revocations = known(notice(A, at_s=NOW_S - 5), notice(A, at_s=NOW_S), notice(A, at_s=NOW_S - 9))
    assert revocations.revoked_at_s(A.peer_id) == NOW_S
    assert revocations.revoked_at_s(B.peer_id) is None
    assert revocations.peers() == (A.peer_id,)
    assert len(revocations.notices()) == 1


def test_certificates_from_after_a_revocation_are_good() -> None:
    revocations = known(notice(A))
    from meshmax.wire.membership import read_certificate

    assert revocations.voids(read_certificate(certificate(A, issued_at_s=NOW_S)))
    assert not revocations.voids(read_certificate(certificate(A, issued_at_s=NOW_S + 1)))


def test_an_admin_revokes_others_with_its_chain() -> None:
    assert known(notice(A, B, chain=chain_of(B))).revoked_at_s(A.peer_id) == NOW_S
    assert known(notice(A, B, chain=chain_of(B, C))).revoked_at_s(A.peer_id) == NOW_S


@pytest.mark.parametrize(
    ("given_notice", "reason"),
    [
        (notice(A, B), "no certificate"),
        (notice(A, B, chain=chain_of(C)), "another peer"),
        (notice(A, B, chain=chain_of(B, scopes=("infer", "pull"))), "without the scope admin"),
        (notice(C, B, chain=chain_of(B, C)), "through whom it was admitted"),
        (notice(A, B, at_s=NOW_S - CERTIFICATE_S, chain=chain_of(B)), "valid only in"),
        (notice(A, at_s=NOW_S + CLOCK_TOLERANCE_S + 1), "of the future"),
        (notice(A, mesh=MeshId(C.peer_id)), "another mesh"),
        (notice(A, chain=chain_of(B)), "the root needs no certificate"),
    ],
)
def test_who_may_not_revoke_is_not_heard(given_notice: RevocationNotice, reason: str) -> None:
    with pytest.raises(NotAMember, match=reason):
        Revocations(MESH).check(given_notice, NOW_S)
    assert known(given_notice).notices() == ()


def test_a_changed_revocation_is_not_heard() -> None:
    good = notice(A).revocation
    bad = RevocationNotice(Signed(good.signer, good.payload, bytes(64)))
    with pytest.raises(ManifestInvalid):
        Revocations(MESH).check(bad, NOW_S)
    assert known(bad).notices() == ()


def test_only_what_is_new_is_passed_on() -> None:
    revocations, first, older = Revocations(MESH), notice(A), notice(A, at_s=NOW_S - 1)
    assert revocations.add([first, notice(B, A), first], NOW_S) == (first,)
    assert revocations.add([first, older], NOW_S) == ()
    assert revocations.add([notice(B)], NOW_S) == (notice(B),)


def test_what_an_admin_revokes_after_the_root_revoked_it_counts_for_nothing() -> None:
    before, after = notice(A, B, NOW_S - 10, chain_of_past(B)), notice(C, B, NOW_S, chain_of_past(B))
    revocations = known(before, after, notice(B, at_s=NOW_S - 5))
    assert revocations.revoked_at_s(A.peer_id) == NOW_S - 10
    assert revocations.revoked_at_s(C.peer_id) is None
    assert revocations.revoked_at_s(B.peer_id) == NOW_S - 5


def test_an_admin_admitted_again_may_revoke_again() -> None:
    again = (certificate(B, issued_at_s=NOW_S - 4),)
    revocations = known(notice(C, B, NOW_S, again), notice(B, at_s=NOW_S - 5))
    assert revocations.revoked_at_s(C.peer_id) == NOW_S


def test_an_admin_whose_admitter_was_revoked_by_the_root_counts_for_nothing_from_then_on() -> None:
    revocations = known(notice(A, B, NOW_S, chain_of_past(B, C)), notice(C, at_s=NOW_S - 5))
    assert revocations.revoked_at_s(A.peer_id) is None


def test_two_admins_can_throw_each_other_out_whatever_dates_they_write() -> None:
    one, other = notice(A, B, NOW_S, chain_of_past(B)), notice(B, A, NOW_S - 100, chain_of_past(A))
    for order in ((one, other), (other, one)):
        revocations = known(*order)
        assert set(revocations.peers()) == {A.peer_id, B.peer_id}


def chain_of_past(*holders: Key) -> tuple[Signed, ...]:
    """As `chain_of`, from a day ago."""
    issuers = (*holders[1:], None)
    return tuple(
        certificate(holder, issued_at_s=NOW_S - 86400)
        if issuer is None
        else certificate(holder, issuer, issued_at_s=NOW_S - 86400)
        for holder, issuer in zip(holders, issuers, strict=True)
    )


NOTICES = [
    notice(target, by, NOW_S - ago_s, chain_of_past(by) if by is not None and by in (A, B) else ())
    for (target, by), ago_s in itertools.product([(A, B), (B, A), (C, A), (C, B), (D, B)], (0, 3, 9))
] + [notice(target, at_s=NOW_S - ago_s) for target in (A, B, C) for ago_s in (1, 6)]


def facts(revocations: Revocations) -> tuple[object, ...]:
    keys = (A, B, C, D, E)
    return (*(revocations.revoked_at_s(key.peer_id) for key in keys), revocations.notices(), revocations.digest())


@settings(max_examples=60)
@given(st.lists(st.sampled_from(NOTICES), max_size=8), st.randoms(use_true_random=False), st.integers(0, 8))
def test_the_order_and_the_batches_of_revocations_do_not_matter(
    chosen: Sequence[RevocationNotice], random: object, cut: int
) -> None:
    shuffled = list(chosen)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    split = Revocations(MESH)
    split.add(shuffled[:cut], NOW_S)
    split.add(shuffled, NOW_S)
    assert facts(split) == facts(known(*chosen))


def test_what_is_older_than_any_certificate_is_forgotten() -> None:
    revocations = known(notice(A))
    assert revocations.add([], NOW_S + MAX_AGE_S) == ()
    assert revocations.peers() == (A.peer_id,)
    revocations.add([], NOW_S + MAX_AGE_S + 1)
    assert revocations.notices() == ()
    assert revocations.add([notice(A)], NOW_S + MAX_AGE_S + 1) == ()


def crowd(count: int) -> list[PeerId]:
    return [Key(10 + number).peer_id for number in range(count)]


def test_no_admin_fills_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BY_ONE", 3)
    revocations = known(notice(E), notice(D, A, NOW_S, chain_of(A)))
    flood = [notice(peer, B, NOW_S + at, chain_of(B)) for at, peer in enumerate(crowd(6))]
    revocations.add(flood, NOW_S)
    assert [revocations.revoked_at_s(peer) is not None for peer in crowd(6)] == [False] * 3 + [True] * 3
    assert revocations.revoked_at_s(E.peer_id) == revocations.revoked_at_s(D.peer_id) == NOW_S
    assert revocations.add(flood[:1], NOW_S) == ()


def test_a_full_table_keeps_the_roots_word_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REVOCATIONS", 4)
    by_root, by_admin = notice(E, at_s=NOW_S - 50), notice(D, A, NOW_S + 50, chain_of(A))
    for order in itertools.permutations([by_root, by_admin]):
        revocations = known(*order, *(notice(peer, B, NOW_S + at, chain_of(B)) for at, peer in enumerate(crowd(6))))
        assert len(revocations.notices()) == 4
        assert set(revocations.peers()) == {E.peer_id, D.peer_id, *crowd(6)[-2:]}


def test_a_flood_that_is_known_already_costs_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    revocations = known(notice(A), notice(B))

    def never(*_: object) -> None:
        raise AssertionError("a signature was checked")

    monkeypatch.setattr(module, "read_revocation", never)
    assert revocations.add([notice(A), notice(B)] * 50, NOW_S) == ()


def test_a_revoked_peer_is_shown_what_is_about_it_and_nothing_else() -> None:
    revocations = known(notice(A), notice(A, B, chain=chain_of(B)), notice(C))
    assert set(revocations.about([A.peer_id, D.peer_id])) == {notice(A), notice(A, B, chain=chain_of(B))}
