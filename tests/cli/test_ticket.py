"""`meshmax ticket` and `meshmax join`: what they print, where they read, and what nobody else sees."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from meshmax.base.membership import Ticket
from meshmax.cli.main import main
from meshmax.cli.ticket import invitation, qr_code
from meshmax.store.mesh_files import MeshFiles
from meshmax.wire.ticket import parse_ticket, ticket_text
from tests.cli.conftest import FakePeer
from tests.members import MESH, A

TICKET = Ticket(
    MESH, "home", A.peer_id, b"\xa5" * 16, ("infer", "pull"), int(time.time()) + 86400, ("/ip4/10.0.0.1/tcp/1",)
)
TEXT = ticket_text(TICKET)
GIVEN = {
    "ticket": TEXT, "mesh_name": "home", "scopes": ["infer", "pull"], "uses": 1, "expires_at": "2100-01-01T00:00:00Z",
    "addresses": ["/ip4/10.0.0.1/tcp/1"],
}  # fmt: skip
JOINED = {
    "mesh": MESH, "name": "home", "private": True, "root": False, "scopes": ["infer"],
    "expires_at": "2100-01-01T00:00:00Z", "problem": "",
}  # fmt: skip
OPEN = {**JOINED, "mesh": "", "name": "", "private": False, "expires_at": None}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MESHMAX_API", "MESHMAX_HOME", "MESHMAX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESHMAX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_into_a_pipe_only_the_ticket_is_printed(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/mesh/tickets", GIVEN)
    assert main(["ticket"]) == 0
    assert capsys.readouterr().out == TEXT + "\n"
    assert fake_peer.bodies("/api/v1/mesh/tickets") == [{"expires_s": 604800, "scopes": ["infer", "pull"], "uses": 1}]


def test_what_a_ticket_is_for_is_asked_of_the_peer(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/mesh/tickets", GIVEN)
    assert main(["ticket", "--expires", "2h", "--scope", "admin,infer", "--uses", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == GIVEN
    assert fake_peer.bodies("/api/v1/mesh/tickets") == [{"expires_s": 7200, "scopes": ["infer", "admin"], "uses": 5}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--expires", "soon"], "like 90s, 30m, 12h, 7d or 2w"),
        (["--expires", "-1d"], "like 90s, 30m, 12h, 7d or 2w"),
        (["--expires", "99999w"], "366d at most"),
        (["--scope", "root"], "scopes are infer"),
        (["--uses", "many"], "--uses"),
        (["--uses", "0"], "from 1 to 100"),
        (["--uses", "-1"], "from 1 to 100"),
    ],
)
def test_what_is_no_ticket_to_be_made_is_refused_here(
    fake_peer: FakePeer, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ticket", *flags]) == 2
    assert said in capsys.readouterr().err
    assert fake_peer.asked == []


def test_a_person_gets_a_code_to_scan_a_line_to_type_and_what_it_is_worth() -> None:
    shown = invitation(GIVEN, time.time(), 80, qr=True)
    assert f"{TEXT}\n" in shown
    assert "meshmax join  (it asks for the ticket" in shown
    assert "too narrow for the QR code" in invitation(GIVEN, time.time(), 40, qr=True)
    assert "too narrow" not in invitation(GIVEN, time.time(), 40, qr=False)
    assert "one peer into 'home' with infer, pull" in shown
    assert "█" in shown
    assert max(len(line) for line in shown.splitlines() if "█" in line) <= 80
    assert "█" not in invitation(GIVEN, time.time(), 80, qr=False)
    assert "█" not in invitation({**GIVEN, "uses": 3}, time.time(), 40, qr=True)
    assert "3 peers" in invitation({**GIVEN, "uses": 3}, time.time(), 40, qr=True)


def test_the_code_of_the_longest_ticket_fits_a_usual_terminal() -> None:
    longest = msgspec.structs.replace(TICKET, addresses=tuple(f"/ip6/fd00::{n}/tcp/11435" for n in range(8)))
    code = qr_code(ticket_text(longest), 80)
    assert code
    assert len(code.splitlines()) <= 34


def test_a_ticket_goes_to_the_running_peer_in_a_body(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/mesh", OPEN)
    fake_peer.on("POST", "/api/v1/mesh/join", JOINED)
    assert main(["join", f" {TEXT[:40]}\n{TEXT[40:]} "]) == 0
    assert fake_peer.bodies("/api/v1/mesh/join") == [{"ticket": TEXT}]
    out, err = capsys.readouterr()
    assert "home (private)" in out
    assert TEXT not in out + err
    assert all(TEXT not in path for _, path, _ in fake_peer.asked)


def test_a_member_hears_that_it_is_one_and_its_ticket_is_left_to_another(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/mesh", {**JOINED, "scopes": ["infer", "pull"]})
    assert main(["join", TEXT]) == 0
    assert "already a member of 'home', with infer, pull" in capsys.readouterr().out
    assert fake_peer.bodies("/api/v1/mesh/join") == []


def test_who_has_not_joined_yet_hears_so_and_no_success(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "not joined yet: not reached (tried once): x; it is tried on by the running peer"
    waiting = {**JOINED, "mesh": "", "name": "", "private": False, "problem": why, "joining": "home"}
    fake_peer.on("GET", "/api/v1/mesh", OPEN)
    fake_peer.on("POST", "/api/v1/mesh/join", waiting)
    assert main(["join", TEXT]) == 4
    out = capsys.readouterr().out
    assert f"The ticket for 'home' is kept; {why}." in out
    assert "open LAN mesh" not in out
    assert main(["join", "--json", TEXT]) == 4
    assert json.loads(capsys.readouterr().out) == waiting


def test_a_ticket_is_read_from_standard_input(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/mesh", OPEN)
    fake_peer.on("POST", "/api/v1/mesh/join", JOINED)
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT.upper() + "\r\n"))
    assert main(["join", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == JOINED
    assert fake_peer.bodies("/api/v1/mesh/join") == [{"ticket": TEXT}]


def test_a_refused_ticket_ends_with_the_sentence(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/mesh", OPEN)
    fake_peer.on("POST", "/api/v1/mesh/join", {"error": "the ticket is used up", "code": "not_a_member"}, 403)
    assert main(["join", TEXT]) == 5
    assert "the ticket is used up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT[:-1], "incomplete or was changed"),
        ("meshmax-", "incomplete"),
        ("hello", "begins with 'meshmax-'"),
        (ticket_text(msgspec.structs.replace(TICKET, expires_at_s=int(time.time()) - 7200)), "expired 2 h ago"),
    ],
)
def test_a_ticket_that_cannot_be_good_is_refused_here(
    home: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["join", text]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert text[10:] not in err or text in ("hello", "meshmax-")
    assert not home.exists()


def test_without_a_peer_the_ticket_is_kept_for_the_next_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", TEXT]) == 0
    out = capsys.readouterr().out
    assert "the next `meshmax peer` uses it" in out
    assert TEXT not in out
    pending = MeshFiles(home).load_pending()
    assert pending is not None
    assert parse_ticket(pending) == TICKET
    assert stat.S_IMODE((home / "mesh" / "ticket").stat().st_mode) == 0o600
    assert main(["mesh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mesh      joining 'home'\n")
    assert "a ticket waits to be used" in out


def test_who_is_in_another_mesh_leaves_it_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "new", "mine"]) == 0
    assert main(["join", TEXT]) == 2
    assert "in the mesh 'mine' already: `meshmax mesh leave`" in capsys.readouterr().err
    assert MeshFiles(home).load_pending() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows a process's arguments from its own memory")
def test_a_ticket_that_was_given_as_an_argument_is_gone_from_the_process_list(tmp_path: Path) -> None:
    # A peer that takes the connection and says nothing holds the command up while we look.
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "meshmax.cli.main", "join", TEXT, "--home", str(tmp_path), "--api", address]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            silent.settimeout(20)
            silent.accept()[0].close()
            shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            process.kill()
    assert b"join" in shown
    assert str(tmp_path).encode() in shown
    assert TEXT.encode() not in shown
    assert TEXT[8:40].encode() not in shown
    assert b"*" * len(TEXT) in shown


def test_tickets_are_taken_back_and_none_is_made(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/mesh/tickets/withdraw", {"withdrawn": 1})
    assert main(["ticket", "--withdraw"]) == 0
    assert capsys.readouterr().out == "One ticket that could still be used will be refused now.\n"
    assert main(["ticket", "--withdraw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"withdrawn": 1}
    assert fake_peer.bodies("/api/v1/mesh/tickets") == []


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("ended_by", "code", "said"), [(EOFError, 2, "a ticket is needed"), (KeyboardInterrupt, 130, "")]
)
def test_a_prompt_that_is_left_ends_with_a_sentence_or_quietly(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended_by: type[BaseException],
    code: int,
    said: str,
) -> None:
    def prompt(_words: str) -> str:
        raise ended_by

    monkeypatch.setattr("sys.stdin", _Terminal())
    monkeypatch.setattr("getpass.getpass", prompt)
    assert main(["join"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert bool(err.strip()) == bool(said)
    assert not home.exists()


def test_who_cannot_use_a_ticket_now_is_said_beside_it(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    warned = {**GIVEN, "warning": "only machines of this network can use this ticket now: no bootstrap node answers"}
    fake_peer.on("POST", "/api/v1/mesh/tickets", warned)
    assert main(["ticket"]) == 0
    out, err = capsys.readouterr()
    assert out == TEXT + "\n"
    assert "only machines of this network" in err
    assert "Attention: only machines of this network" in invitation(warned, time.time(), 80, qr=False)
    assert "Attention" not in invitation(GIVEN, time.time(), 80, qr=False)


def test_a_ticket_that_takes_the_place_of_another_says_so(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/mesh", {**OPEN, "joining": "attic"})
    fake_peer.on("POST", "/api/v1/mesh/join", JOINED)
    assert main(["join", TEXT]) == 0
    assert "The ticket for 'attic' that was kept until now is given up for this one." in capsys.readouterr().out
    assert main(["join", TEXT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**JOINED, "replaced": "attic"}


def test_without_a_peer_a_replaced_ticket_is_named_and_the_same_one_is_not(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ticket_text(msgspec.structs.replace(TICKET, mesh_name="attic"))
    for text, said in ((other, False), (other, False), (TEXT, True)):
        assert main(["join", text]) == 0
        assert ("The ticket for 'attic' that was kept" in capsys.readouterr().out) is said
