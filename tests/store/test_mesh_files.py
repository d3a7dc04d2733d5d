"""The mesh's files: kept over restarts, closed to others, whole or not at all, and damage is never taken for an open mesh."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from meshmax.base.errors import ConfigError, InvalidRequest, StoreError
from meshmax.base.membership import SCOPES, MeshId, Revocation, RevocationNotice, Ticket
from meshmax.core.membership import Membership
from meshmax.core.tickets import Tickets
from meshmax.store.disk import Disk
from meshmax.store.mesh_files import MEMBER_FILE, MeshFiles, OwnMesh
from meshmax.wire.membership import sign_revocation
from meshmax.wire.ticket import ticket_text
from tests.members import MESH, NOW_S, A, B, chain_of, notice

OTHER = MeshId(B.peer_id)
OWN = OwnMesh(MESH, "home", chain_of(A, B))


TEXT = ticket_text(Ticket(MESH, "home", A.peer_id, bytes(16), ("infer",), NOW_S))
NODE = f"/ip4/192.0.2.1/tcp/11435/p2p/{A.peer_id}"


@pytest.fixture
def files(tmp_path: Path) -> MeshFiles:
    return MeshFiles(tmp_path)


def given() -> Tickets:
    tickets = Tickets()
    tickets.give(b"s" * 16, ("infer",), 100, 2, NOW_S)
    tickets.redeem(b"s" * 16, A.peer_id, NOW_S)
    return tickets


def test_without_files_the_mesh_is_open(files: MeshFiles) -> None:
    assert files.load_own() is None
    assert files.load_root(MESH) is None
    assert files.load_pending() is None
    assert files.load_notices(MESH) == ()
    assert files.load_tickets(MESH) == ()
    assert not files.folder.exists()


def test_what_was_kept_is_there_after_a_restart(files: MeshFiles, tmp_path: Path) -> None:
    files.save_own(OWN)
    files.save_notices(MESH, [notice(A), notice(A, B, chain=chain_of(B))])
    files.save_tickets(MESH, given().given)
    files.save_pending(TEXT)
    again = MeshFiles(tmp_path)
    assert again.load_own() == OWN
    assert again.load_notices(MESH) == (notice(A), notice(A, B, chain=chain_of(B)))
    assert again.load_tickets(MESH) == given().given
    assert again.load_pending() == TEXT
    again.drop_pending()
    assert again.load_pending() is None


def test_a_new_mesh_has_a_root_key_and_us_as_a_member_with_every_scope(files: MeshFiles) -> None:
    own = files.found(" home ", A.peer_id, NOW_S)
    assert files.load_own() == own
    assert own.name == "home"
    word = Membership(own.mesh).verify(own.chain, A.peer_id, NOW_S)
    assert word.scopes == SCOPES
    root = files.load_root(own.mesh)
    assert root is not None
    assert str(root.peer_id) == own.mesh
    assert [path.name for path in (files.folder / "roots").iterdir()] == [f"{own.mesh}.key"]


def test_two_new_meshes_have_two_keys_and_the_first_is_kept(files: MeshFiles) -> None:
    first, second = files.found("a", A.peer_id, NOW_S), files.found("b", A.peer_id, NOW_S)
    assert first.mesh != second.mesh
    assert files.load_root(first.mesh)
    assert files.load_root(second.mesh)


def test_a_mesh_needs_a_name(files: MeshFiles) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        files.found("", A.peer_id, NOW_S)
    assert not files.folder.exists()


def test_nobody_else_may_read_any_of_it(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    files.save_notices(MESH, [])
    files.save_tickets(MESH, ())
    files.save_pending("x")
    for path in (files.folder, files.folder / "roots"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in [*files.folder.glob("*"), files.root_path(own.mesh)]:
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_kept_ticket_that_is_damaged_is_told_and_names_the_file(files: MeshFiles) -> None:
    files.save_pending(TEXT[:-1])
    with pytest.raises(ConfigError, match="mesh/ticket is damaged: remove it"):
        files.load_pending()


def test_the_root_comes_back_and_still_knows_whom_it_threw_out(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    root = files.load_root(own.mesh)
    assert root is not None
    word = sign_revocation(Revocation(own.mesh, B.peer_id, NOW_S), root.peer_id, root.sign)
    files.save_notices(own.mesh, [RevocationNotice(word)])
    files.leave()
    files.save_own(OWN)  # another mesh in between
    files.save_notices(MESH, [notice(A)])
    files.leave()
    for wanted in ("", "home", own.mesh):
        assert files.find_root(wanted) == own.mesh
        back = files.rejoin(own.mesh, A.peer_id, NOW_S + 5)
        assert files.load_own() == back
        assert back.name == "home"
        assert files.load_notices(own.mesh) == (RevocationNotice(word),)
        assert Membership(own.mesh).verify(back.chain, A.peer_id, NOW_S).scopes == SCOPES
        files.leave()


def test_a_copy_of_the_root_key_makes_this_machine_the_root(files: MeshFiles, tmp_path: Path) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    other = MeshFiles(tmp_path / "other")
    with pytest.raises(InvalidRequest, match="no root key is here: copy it to"):
        other.find_root()
    (other.folder / "roots").mkdir(parents=True)
    other.root_path(own.mesh).write_bytes(files.root_path(own.mesh).read_bytes())
    with pytest.raises(InvalidRequest, match="--name"):
        other.rejoin(other.find_root(), B.peer_id, NOW_S)
    assert other.load_own() is None
    assert other.rejoin(own.mesh, B.peer_id, NOW_S, "home").name == "home"
    assert stat.S_IMODE(other.root_path(own.mesh).stat().st_mode) == 0o600


def test_the_root_that_an_admin_revoked_comes_back_with_a_certificate_that_counts(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    root = files.load_root(own.mesh)
    assert root is not None
    word = sign_revocation(Revocation(own.mesh, A.peer_id, NOW_S + 9), root.peer_id, root.sign)
    files.save_notices(own.mesh, [RevocationNotice(word)])
    back = files.rejoin(own.mesh, A.peer_id, NOW_S + 9)
    membership = Membership(own.mesh, files.load_notices(own.mesh), NOW_S + 9)
    assert membership.verify(back.chain, A.peer_id, NOW_S + 10).scopes == SCOPES


def test_which_of_several_roots_is_meant_must_be_said(files: MeshFiles) -> None:
    first, second = files.found("a", A.peer_id, NOW_S), files.found("b", A.peer_id, NOW_S)
    files.leave()
    with pytest.raises(InvalidRequest, match=r"say of which mesh.*\(b\)"):
        files.find_root()
    with pytest.raises(InvalidRequest, match="say of which mesh"):
        files.find_root("c")
    assert (files.find_root("b"), files.find_root(first.mesh)) == (second.mesh, first.mesh)


def test_what_is_left_of_a_mesh_is_damaged_or_whole(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    files.leave()
    path = files.folder / "roots" / f"{own.mesh}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is damaged: put back a copy"):
        files.rejoin(own.mesh, A.peer_id, NOW_S)
    assert files.load_own() is None


def test_who_leaves_keeps_nothing_but_root_keys(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    files.save_notices(own.mesh, [])
    files.save_tickets(own.mesh, given().given)
    files.leave()
    assert files.load_own() is None
    assert [path.name for path in files.folder.iterdir()] == ["roots"]
    assert files.load_root(own.mesh)
    files.leave()


def test_revocations_and_tickets_of_a_mesh_that_was_left_count_for_nothing(files: MeshFiles) -> None:
    files.save_notices(OTHER, [notice(A)])
    files.save_tickets(OTHER, given().given)
    assert files.load_notices(MESH) == ()
    assert files.load_tickets(MESH) == ()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"{}", b'{"mesh": 1}', b"[" * 5000])
@pytest.mark.parametrize("name", ["member.json", "revocations.json", "tickets.json"])
def test_a_damaged_file_is_told_with_a_remedy_and_left_as_it_is(files: MeshFiles, name: str, content: bytes) -> None:
    files.save_own(OWN)
    (files.folder / name).write_bytes(content)
    loads: dict[str, Callable[[], object]] = {
        "member.json": files.load_own,
        "revocations.json": lambda: files.load_notices(MESH),
        "tickets.json": lambda: files.load_tickets(MESH),
    }
    with pytest.raises(ConfigError, match=r"is damaged: put back a copy of it, or move it away"):
        loads[name]()
    assert (files.folder / name).read_bytes() == content


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_every_cut_of_our_membership_is_damage(files: MeshFiles, cut: int) -> None:
    files.save_own(OWN)
    path = files.folder / "member.json"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConfigError, match="damaged"):
        files.load_own()


@pytest.mark.parametrize(
    "own", [OwnMesh(MeshId(""), "x", OWN.chain), OwnMesh(MESH, "x", ()), OwnMesh(MESH, "", OWN.chain)]
)
def test_a_membership_that_cannot_be_is_damage(files: MeshFiles, own: OwnMesh) -> None:
    files.save_own(own)
    with pytest.raises(ConfigError, match="damaged"):
        files.load_own()


def test_a_file_that_grew_too_large_is_damage(files: MeshFiles) -> None:
    files.save_pending("x" * 9000)
    with pytest.raises(ConfigError, match="damaged: remove it"):
        files.load_pending()


def test_a_damaged_root_key_and_one_of_another_mesh_are_told(files: MeshFiles) -> None:
    first, second = files.found("a", A.peer_id, NOW_S), files.found("b", A.peer_id, NOW_S)
    files.root_path(first.mesh).write_bytes(files.root_path(second.mesh).read_bytes())
    with pytest.raises(ConfigError, match="of another mesh"):
        files.load_root(first.mesh)
    files.root_path(first.mesh).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"the root key .* is damaged: put back a copy"):
        files.load_root(first.mesh)


def test_a_mesh_id_is_no_path(files: MeshFiles) -> None:
    with pytest.raises(InvalidRequest):
        files.load_root(MeshId("../../identity"))


class _Dying(Disk):
    def sync(self, fd: int) -> None:
        raise OSError(5, "Input/output error")


def test_a_write_that_fails_leaves_the_old_file(files: MeshFiles, tmp_path: Path) -> None:
    files.save_own(OWN)
    with pytest.raises(StoreError, match="was not written"):
        MeshFiles(tmp_path, _Dying()).save_own(OwnMesh(OTHER, "other", OWN.chain))
    assert files.load_own() == OWN
    (files.folder / ".meshmax-tmp-left").write_bytes(b"")
    files.sweep()
    assert sorted(path.name for path in files.folder.iterdir()) == ["member.json"]


def test_what_the_root_signs_is_of_its_mesh(files: MeshFiles) -> None:
    own = files.found("home", A.peer_id, NOW_S)
    root = files.load_root(own.mesh)
    assert root is not None
    membership = Membership(own.mesh)
    signed = sign_revocation(Revocation(own.mesh, B.peer_id, NOW_S), root.peer_id, root.sign)
    assert membership.revoke([RevocationNotice(signed)], NOW_S)


def test_bootstrap_nodes_are_kept_with_the_membership_and_go_with_it(files: MeshFiles, tmp_path: Path) -> None:
    own = msgspec.structs.replace(OWN, bootstrap=(NODE,))
    files.save_own(own)
    assert MeshFiles(tmp_path).load_own() == own
    files.leave()
    assert files.load_own() is None
    assert not any(NODE.encode() in path.read_bytes() for path in files.folder.rglob("*") if path.is_file())


def test_a_membership_without_bootstrap_nodes_is_written_as_it_always_was(files: MeshFiles) -> None:
    files.save_own(OWN)
    assert set(json.loads((files.folder / MEMBER_FILE).read_bytes())) == {"mesh", "name", "chain"}
    assert files.load_own() == OWN


@pytest.mark.parametrize(
    "bootstrap", [("nowhere",), (NODE, NODE), tuple(NODE.replace("11435", str(port)) for port in range(1, 18))]
)
def test_bootstrap_nodes_that_cannot_be_are_damage(files: MeshFiles, bootstrap: tuple[str, ...]) -> None:
    files.save_own(msgspec.structs.replace(OWN, bootstrap=bootstrap))
    with pytest.raises(ConfigError, match="damaged"):
        files.load_own()
