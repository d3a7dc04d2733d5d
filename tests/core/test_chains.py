"""Chains: only one that leads from the very peer to the very root, unchanged and in time, is believed; no scope grows on it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_CHAIN, SCOPES, Chain, MeshId, Scope
from meshmax.core.chains import CERTIFICATE_S, CLOCK_TOLERANCE_S, check_times, clock_hint, read_chain, summary
from tests.members import MESH, NOW_S, ROOT, A, B, C, D, E, Key, certificate, chain_of

some_scopes = st.sets(st.sampled_from(SCOPES), min_size=1)


def verified(chain: Chain, peer_id: PeerId = A.peer_id, now_s: float = NOW_S) -> tuple[Scope, ...]:
    certificates = read_chain(chain, MESH, peer_id)
    check_times(certificates, now_s)
    return summary(certificates).scopes


@pytest.mark.parametrize("holders", [(A,), (A, B), (A, B, C), (A, B, C, D)])
def test_a_chain_to_the_root_is_believed(holders: tuple[Key, ...]) -> None:
    assert verified(chain_of(*holders)) == SCOPES


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), "no certificate was shown"),
        (chain_of(A, B, C, D, E), f"more than {MAX_CHAIN} steps"),
        (chain_of(B), "belongs to another peer"),
        (chain_of(A, B)[:1], "not signed by the mesh's root"),
        ((certificate(A, B), certificate(C)), "belongs to another peer"),
        ((*chain_of(A), *chain_of(A)), "goes on after"),
        ((certificate(A, mesh=MeshId(C.peer_id)),), "another mesh"),
        ((certificate(A, B), certificate(B, scopes=("infer", "pull"))), "may not admit others"),
        ((certificate(A, life_s=CERTIFICATE_S * 2),), "longer than certificates may be"),
        ((certificate(A, A),), "not signed by the mesh's root"),
    ],
)
def test_what_does_not_lead_to_the_root_is_refused_with_a_reason(chain: Chain, reason: str) -> None:
    with pytest.raises(NotAMember, match=reason):
        read_chain(chain, MESH, A.peer_id)


LONG = chain_of(A, B, C)
PARTS = [(index, field) for index in range(len(LONG)) for field in ("signer", "payload", "signature")]


@given(st.sampled_from(PARTS), st.integers(0, 10_000), st.integers(0, 7))
def test_no_chain_that_was_altered_anywhere_verifies(part: tuple[int, str], at: int, bit: int) -> None:
    index, field = part
    value = getattr(LONG[index], field)
    raw = bytearray(value.encode() if isinstance(value, str) else value)
    raw[at % len(raw)] ^= 1 << bit
    changed = raw.decode("latin-1") if isinstance(value, str) else bytes(raw)
    chain = [*LONG]
    chain[index] = msgspec.structs.replace(LONG[index], **{field: changed})
    with pytest.raises(NotAMember):
        verified(tuple(chain))


@given(st.lists(st.integers(0, len(LONG) - 1), max_size=MAX_CHAIN))
def test_no_chain_of_other_parts_or_another_order_verifies(order: list[int]) -> None:
    chain = tuple(LONG[index] for index in order)
    if chain != LONG:
        with pytest.raises(NotAMember):
            verified(chain)


@given(st.lists(some_scopes, min_size=1, max_size=MAX_CHAIN))
def test_no_scope_grows_along_a_chain(scopes: list[set[Scope]]) -> None:
    holders = [A, B, C, D][: len(scopes)]
    chain = tuple(
        certificate(holder, issuer, each)
        for holder, issuer, each in zip(holders, [*holders[1:], ROOT], scopes, strict=True)
    )
    try:
        allowed = verified(chain)
    except NotAMember:
        return
    assert set(allowed) == set.intersection(*scopes)
    assert all("admin" in each for each in scopes[1:])


def test_a_chain_that_leaves_no_scope_is_refused() -> None:
    chain = (certificate(A, B, ("infer",)), certificate(B, scopes=("admin",)))
    with pytest.raises(NotAMember, match="allows nothing"):
        verified(chain)


def test_a_chain_lasts_as_long_as_its_shortest_certificate() -> None:
    chain = (certificate(A, B), certificate(B, life_s=1000))
    assert summary(read_chain(chain, MESH, A.peer_id)).expires_at_s == NOW_S + 1000
    assert verified(chain, now_s=NOW_S + 1000 + CLOCK_TOLERANCE_S)
    with pytest.raises(NotAMember, match="expired 10 min ago: join again with a new ticket, unless the clock is off"):
        verified(chain, now_s=NOW_S + 1600)


def test_clocks_may_differ_by_five_minutes_and_not_by_hours() -> None:
    assert verified(chain_of(A), now_s=NOW_S - CLOCK_TOLERANCE_S)
    with pytest.raises(NotAMember, match="valid only in 3 h: clock off by about 3 h"):
        verified(chain_of(A), now_s=NOW_S - 3 * 3600)


def test_two_clocks_that_differ_are_told_so() -> None:
    assert clock_hint(NOW_S, NOW_S + CLOCK_TOLERANCE_S) == ""
    assert clock_hint(NOW_S, NOW_S - 10800) == "the two clocks differ by 3 h"


def test_no_reason_names_the_mesh_or_its_members() -> None:
    for chain in (chain_of(B), (certificate(A, B), certificate(C)), (certificate(A, mesh=MeshId(C.peer_id)),)):
        with pytest.raises(NotAMember) as caught:
            verified(chain)
        assert "12D3" not in caught.value.message
