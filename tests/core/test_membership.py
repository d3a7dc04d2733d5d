"""Membership: who is a member now, what certificates are made out for, when they are renewed and by whom."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidRequest, NotAMember, OutOfScope
from meshmax.base.ids import PeerId
from meshmax.base.membership import SCOPES, Chain, Scope
from meshmax.core.chains import CERTIFICATE_S
from meshmax.core.membership import MIN_RENEW_S, Membership, check_mesh_name, may_renew, parse_scopes, renew_at_s
from meshmax.wire.membership import read_certificate, sign_certificate
from tests.members import MESH, NOW_S, ROOT, A, B, C, D, Key, certificate, chain_of, notice


def issued(
    membership: Membership, holder: Key, issuer: Key, issuer_chain: Chain, scopes: Sequence[Scope], now_s: float
) -> Chain:
    word = membership.issue(holder.peer_id, scopes, now_s, issuer=issuer_chain, issuer_id=issuer.peer_id)
    return (sign_certificate(word, issuer.peer_id, issuer.sign), *issuer_chain)


def test_a_member_is_who_holds_a_chain_in_time() -> None:
    word = Membership(MESH).verify(chain_of(A, B), A.peer_id, NOW_S)
    assert (word.peer_id, word.scopes, word.expires_at_s) == (A.peer_id, SCOPES, NOW_S + CERTIFICATE_S)


def test_a_revoked_member_is_none_and_is_told_so() -> None:
    membership = Membership(MESH, [notice(A)], NOW_S)
    with pytest.raises(NotAMember, match="the certificate was revoked"):
        membership.verify(chain_of(A), A.peer_id, NOW_S)


def test_what_a_revoked_admin_issued_is_worth_nothing_whatever_its_date() -> None:
    membership = Membership(MESH)
    late = (certificate(A, B, issued_at_s=NOW_S + 200), certificate(B))
    membership.verify(late, A.peer_id, NOW_S)
    assert membership.revoke([notice(B)], NOW_S)
    for chain in (chain_of(A, B), late):
        with pytest.raises(NotAMember, match="issued by a member that was revoked: join again"):
            membership.verify(chain, A.peer_id, NOW_S)
    membership.verify(chain_of(A), A.peer_id, NOW_S)


def test_who_is_invited_again_after_a_revocation_is_a_member_again_and_may_be_revoked_again() -> None:
    membership = Membership(MESH, [notice(A)], NOW_S)
    again = issued(membership, A, ROOT, (), ("infer",), NOW_S)
    assert membership.verify(again, A.peer_id, NOW_S).issued_at_s == NOW_S + 1
    membership.revoke([notice(A, at_s=NOW_S + 1)], NOW_S + 1)
    with pytest.raises(NotAMember):
        membership.verify(again, A.peer_id, NOW_S + 1)


@given(
    st.lists(st.sets(st.sampled_from(SCOPES), min_size=1), min_size=1, max_size=5), st.integers(0, 3 * CERTIFICATE_S)
)
def test_however_members_admit_each_other_no_scope_and_no_life_grows(wanted: list[set[Scope]], later_s: int) -> None:
    membership, keys = Membership(MESH), (A, B, C, D, Key(9))
    chain: Chain = ()
    issuer, allowed, ends_s = ROOT, set(SCOPES), NOW_S + later_s + CERTIFICATE_S
    for key, scopes in zip(keys, wanted, strict=False):
        try:
            chain = issued(membership, key, issuer, chain, tuple(scopes), NOW_S + later_s)
        except OutOfScope:
            assert not scopes <= allowed or "admin" not in allowed or len(chain) == 4
            return
        word = membership.verify(chain, key.peer_id, NOW_S + later_s)
        assert set(word.scopes) == scopes <= allowed
        assert word.expires_at_s <= ends_s
        issuer, allowed, ends_s = key, scopes, word.expires_at_s


@pytest.mark.parametrize(
    ("chain", "issuer_id", "scopes", "reason"),
    [
        (chain_of(B, scopes=("infer",)), B.peer_id, ("infer",), "only a member with the scope admin"),
        ((certificate(B, scopes=("infer", "admin")),), B.peer_id, ("pull",), "scope pull is lacking here"),
        (chain_of(B, C, D, A), B.peer_id, ("pull",), "steps away"),
        ((), B.peer_id, ("pull",), "only the mesh's root"),
    ],
)
def test_who_may_not_issue_does_not(chain: Chain, issuer_id: PeerId, scopes: Sequence[Scope], reason: str) -> None:
    with pytest.raises(OutOfScope, match=reason):
        Membership(MESH).issue(A.peer_id, scopes, NOW_S, issuer=chain, issuer_id=issuer_id)


def test_an_issuer_that_is_no_member_itself_issues_nothing() -> None:
    with pytest.raises(NotAMember, match="expired"):
        Membership(MESH).issue(
            A.peer_id, ("infer",), NOW_S + 2 * CERTIFICATE_S, issuer=chain_of(B), issuer_id=B.peer_id
        )
    with pytest.raises(InvalidRequest):
        Membership(MESH).issue(A.peer_id, (), NOW_S, issuer=(), issuer_id=ROOT.peer_id)


def test_each_certificate_of_a_peer_has_a_higher_serial() -> None:
    word = Membership(MESH).issue(A.peer_id, ("infer",), NOW_S, issuer=(), issuer_id=ROOT.peer_id, serial=7)
    assert word.serial == 8


def test_a_certificate_is_renewed_from_a_third_of_its_life_on() -> None:
    word = read_certificate(certificate(A))
    times = [renew_at_s(word, Random(seed)) - NOW_S for seed in range(200)]
    assert min(times) >= CERTIFICATE_S / 3
    assert max(times) <= CERTIFICATE_S * (1 / 3 + 0.1)
    assert max(times) - min(times) > CERTIFICATE_S * 0.05
    brief = msgspec.structs.replace(word, expires_at_s=NOW_S + 10)
    assert renew_at_s(brief, Random(0)) == NOW_S + MIN_RENEW_S


@pytest.mark.parametrize(
    ("own", "other", "may"),
    [
        (("infer",), SCOPES, True),
        (("infer", "pull"), ("infer", "pull", "admin"), True),
        (("pull",), ("infer", "admin"), False),
        (("infer",), ("infer", "pull"), False),
    ],
)
def test_who_renews_takes_no_scope_away(own: tuple[Scope, ...], other: tuple[Scope, ...], may: bool) -> None:
    assert (
        may_renew(read_certificate(certificate(A, scopes=own)), read_certificate(certificate(B, scopes=other))) is may
    )


def test_a_mesh_has_a_short_printable_name() -> None:
    assert check_mesh_name("  our house ") == "our house"
    for name in ("", "   ", "x" * 65, "a\nb", "a\x1b[0m"):
        with pytest.raises(InvalidRequest, match="1 to 64 printable"):
            check_mesh_name(name)


def test_scopes_are_read_from_a_list() -> None:
    assert parse_scopes("pull, INFER") == ("infer", "pull")
    for text in ("", "infer,root", ","):
        with pytest.raises(InvalidRequest, match="scopes are infer"):
            parse_scopes(text)
