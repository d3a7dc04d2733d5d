"""What is remembered of members, and of whom it is forgotten first."""

import pytest

from meshmax.base.errors import NotAMember
from meshmax.services import standing as module
from meshmax.services.standing import Standing
from meshmax.store.mesh_files import OwnMesh
from tests.members import MESH, NOW_S, A, B, C, D, chain_of, notice


def test_a_member_in_use_is_not_the_one_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    standing = Standing(A, OwnMesh(MESH, "home", chain_of(A)), now_s=NOW_S)
    for holder in (B, C):
        standing.note(holder.peer_id, standing.verify(chain_of(holder), holder.peer_id, NOW_S))
    standing.member(B.peer_id, NOW_S)
    standing.note(D.peer_id, standing.verify(chain_of(D), D.peer_id, NOW_S))
    assert [peer_id for peer_id, _ in standing.members] == [B.peer_id, D.peer_id]
    assert (standing.knows(B.peer_id), standing.knows(C.peer_id)) == (True, False)


def test_what_was_verified_is_confirmed_until_it_is_revoked_or_over() -> None:
    standing = Standing(A, OwnMesh(MESH, "home", chain_of(A)), now_s=NOW_S)
    member = standing.verify(chain_of(B, C), B.peer_id, NOW_S)
    standing.confirm(B.peer_id, member, NOW_S)
    with pytest.raises(NotAMember, match="expired"):
        standing.confirm(B.peer_id, member, NOW_S + 40 * 86400)
    assert standing.core is not None
    standing.core.revoke([notice(C, at_s=NOW_S)], NOW_S)
    with pytest.raises(NotAMember, match="issued by a member that was revoked"):
        standing.confirm(B.peer_id, member, NOW_S)
