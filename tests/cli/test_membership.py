"""`meshmax mesh`, with a running peer and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshmax.cli.main import main
from meshmax.store.home import hold_home
from meshmax.store.mesh_files import MeshFiles
from tests.cli.conftest import FakePeer

OPEN = {
    "mesh": "", "name": "", "private": False, "root": False, "scopes": ["infer"], "expires_at": None, "problem": "",
}  # fmt: skip
PRIVATE = {
    **OPEN, "mesh": "12D3KooWx", "name": "our \x1b[31mhouse", "private": True, "root": True,
    "scopes": ["infer", "pull"], "expires_at": "2100-01-01T00:00:00Z",
}  # fmt: skip
NAMED = {"address": "/ip4/10.0.0.9/tcp/1/p2p/12D3KooWb", "source": "ticket"}


def test_the_open_mesh_is_said_to_be_open_and_how_to_close_it(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/mesh", OPEN)
    assert main(["mesh"]) == 0
    assert "anyone on this LAN may use it; `meshmax mesh new NAME` closes it" in capsys.readouterr().out
    fake_peer.on("GET", "/api/v1/mesh", {**OPEN, "lan": False})
    assert main(["mesh"]) == 0
    assert "not announced on the LAN (--no-lan)" in capsys.readouterr().out


def test_a_private_mesh_is_shown_with_what_we_may_and_no_escape_sequence(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/mesh", {**PRIVATE, "problem": "clock off by 3 h?", "bootstrap": [NAMED]})
    assert main(["mesh"]) == 0
    out = capsys.readouterr().out
    for words in (
        "our [31mhouse (private)",
        "12D3KooWx",
        "infer, pull; the certificate ends",
        "/ip4/10.0.0.9/tcp/1/p2p/12D3KooWb (a ticket named it; forgotten with the mesh)",
        "mesh/roots/",
        "clock off",
    ):
        assert words in out
    assert "\x1b" not in out


def test_a_mesh_is_made_and_left_at_the_running_peer(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/mesh", PRIVATE)
    fake_peer.on("POST", "/api/v1/mesh/leave", OPEN)
    fake_peer.on("GET", "/api/v1/mesh", PRIVATE)
    assert main(["mesh", "new", "home", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PRIVATE
    assert main(["mesh", "leave"]) == 0
    out = capsys.readouterr().out
    assert "Left 'our [31mhouse'. Tickets of this peer that were still open are void." in out
    assert "`meshmax mesh rejoin` returns" in out
    assert fake_peer.bodies("/api/v1/mesh") == [{"name": "home"}, None]
    assert fake_peer.bodies("/api/v1/mesh/leave") == [{}]


def test_members_are_a_table(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    member: dict[str, Any] = {
        "peer_id": "12D3a", "name": "desk", "scopes": ["infer", "pull"], "expires_at": "2100-01-01T00:00:00Z",
        "revoked_at": None,
    }  # fmt: skip
    gone = {**member, "peer_id": "12D3b", "name": "", "scopes": [], "revoked_at": "2020-01-01T00:00:00Z"}
    fake_peer.on("GET", "/api/v1/mesh/members", {"members": [member, gone]})
    assert main(["mesh", "members"]) == 0
    rows = [line.split("    ") for line in capsys.readouterr().out.splitlines()]
    assert [word.strip() for word in rows[1] if word.strip()][:3] == ["desk", "12D3a", "infer, pull"]
    assert "revoked" in rows[2][-1]


def test_in_the_open_mesh_there_are_no_members_to_list(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/mesh/members", {"members": []})
    assert main(["mesh", "members"]) == 0
    assert "in the open mesh" in capsys.readouterr().out


def test_a_member_is_revoked_and_a_refusal_ends_with_its_code(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/v1/mesh/revoke", {"peer_id": "12D3a"})
    assert main(["mesh", "revoke", "desk"]) == 0
    assert "12D3a is no member any more" in capsys.readouterr().out
    fake_peer.on("POST", "/api/v1/mesh/revoke", {"error": "it lacks the scope admin", "code": "out_of_scope"}, 403)
    assert main(["mesh", "revoke", "desk"]) == 5
    assert "lacks the scope admin" in capsys.readouterr().err


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MESHMAX_API", "MESHMAX_HOME", "MESHMAX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESHMAX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_without_a_peer_a_mesh_is_made_shown_and_left_in_the_files(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mesh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["private"] is False
    assert not home.exists()
    assert main(["mesh", "new", "our house"]) == 0
    out = capsys.readouterr().out
    assert "our house (private)" in out
    assert "for that, `meshmax peer` must run" in out
    assert main(["mesh", "--home", str(home / "nothere")]) == 2
    assert "no peer's home is at" in capsys.readouterr().err
    assert main(["mesh", "bogus"]) == 2
    assert "it takes new NAME, members, revoke PEER, leave and rejoin" in capsys.readouterr().err
    assert main(["mesh", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["root"], shown["scopes"]) == ("our house", True, ["infer", "pull", "admin"])
    own = MeshFiles(home).load_own()
    assert own is not None
    assert shown["mesh"] == own.mesh
    assert main(["mesh", "new", "another"]) == 2
    assert "`meshmax mesh leave` leaves it first" in capsys.readouterr().err
    assert main(["mesh", "leave"]) == 0
    assert MeshFiles(home).load_own() is None
    assert MeshFiles(home).load_root(own.mesh) is not None


def test_without_a_peer_bootstrap_nodes_of_tickets_are_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "new", "x"]) == 0
    files = MeshFiles(home)
    own = files.load_own()
    assert own is not None
    named = f"/ip4/192.0.2.1/tcp/11435/p2p/{own.mesh}"
    files.save_own(msgspec.structs.replace(own, bootstrap=(named,)))
    capsys.readouterr()
    assert main(["mesh"]) == 0
    assert f"bootstrap {named} (a ticket named it" in capsys.readouterr().out


def test_a_home_that_a_starting_peer_holds_is_not_changed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_home(home):
        assert main(["mesh", "new", "x"]) == 2
    assert "is running on" in capsys.readouterr().err
    assert MeshFiles(home).load_own() is None


def test_damaged_files_are_told_and_no_open_mesh_is_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "new", "x"]) == 0
    (home / "mesh" / "member.json").write_bytes(b"{")
    for command in (["mesh"], ["mesh", "new", "y"]):
        assert main(command) == 2
        assert "is damaged: put back a copy of it" in capsys.readouterr().err


def test_an_identity_that_is_not_the_members_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "new", "x"]) == 0
    (home / "identity.key").unlink()
    capsys.readouterr()
    assert main(["mesh"]) == 0
    assert "the identity is gone" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["mesh", "members"], ["mesh", "revoke", "x"], ["ticket"]])
def test_what_needs_a_running_peer_says_so(home: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 4
    assert "start one with `meshmax peer`" in capsys.readouterr().err


def test_the_running_peer_comes_back_into_a_mesh(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/mesh/rejoin", PRIVATE)
    assert main(["mesh", "rejoin"]) == 0
    assert main(["mesh", "rejoin", "house", "--name", "home", "--json"]) == 0
    assert fake_peer.bodies("/api/v1/mesh/rejoin") == [{"mesh": "", "name": ""}, {"mesh": "house", "name": "home"}]


def test_without_a_peer_a_mesh_is_come_back_to_in_the_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "rejoin"]) == 2
    assert "no root key is here" in capsys.readouterr().err
    assert main(["mesh", "new", "house"]) == 0
    own = MeshFiles(home).load_own()
    assert own is not None
    assert main(["mesh", "leave"]) == 0
    capsys.readouterr()
    assert main(["mesh", "rejoin", "house", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["mesh"], shown["name"], shown["root"]) == (own.mesh, "house", True)
    assert main(["mesh", "leave"]) == 0
    assert main(["mesh", "new", "other"]) == 0
    assert main(["mesh", "rejoin", "house"]) == 2
    assert "`meshmax mesh leave` leaves it first" in capsys.readouterr().err
