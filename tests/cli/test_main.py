from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshmax import __version__
from meshmax.cli.main import _COMMANDS, _spelled_out, main
from meshmax.store.home import hold_home
from tests.cli.conftest import FakePeer


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshmax {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for names, _, _ in _COMMANDS:
        assert (names if isinstance(names, str) else names[0]) in shown


@pytest.mark.parametrize("names", [names for names, _, _ in _COMMANDS])
def test_every_command_can_be_imported_and_has_help(
    names: str | tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [names] if isinstance(names, str) else names:
        assert main([name, "--help"]) == 0
        assert f"meshmax {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], 'Unknown command "frobnicate"'),
        (["pulll"], 'Did you mean "pull"?'),
        (["list", "--frob"], "Unknown option: --frob"),
        (["cp", "a"], "DESTINATION requires an argument"),
        (["run", "m", "--format", "xml", "hi"], "--format"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["list", "ps", "peers", "status"])
def test_without_a_running_peer_a_command_says_how_to_start_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MESHMAX_API", raising=False)
    assert main([command, "--home", str(tmp_path)]) == 4
    assert capsys.readouterr().err == (
        f"Error: no meshmax peer is running here (home {tmp_path}): start one with `meshmax peer`\n"
    )


def test_a_peer_that_is_just_starting_is_told_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MESHMAX_API", raising=False)
    with hold_home(tmp_path):
        assert main(["list", "--home", str(tmp_path)]) == 4
    assert capsys.readouterr().err == (
        "Error: a peer with this home is starting or ending: try again in a few seconds\n"
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["drain", "--deadline", "-5s"], ["drain", "--deadline=-5s"]),
        (["run", "m", "--keepalive", "-1", "hi"], ["run", "m", "--keepalive=-1", "hi"]),
        (["drain", "--deadline", "--json"], ["drain", "--deadline", "--json"]),
        (["run", "m", "--", "--keepalive", "-1"], ["run", "m", "--", "--keepalive", "-1"]),
    ],
)
def test_a_time_below_zero_is_a_value_and_no_option(given: list[str], meant: list[str]) -> None:
    assert _spelled_out(given) == meant


def test_an_address_where_nothing_listens_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--api", "127.0.0.1:1"]) == 4
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["ftp://x", "http://", "127.0.0.1:99999999", "http://x/y"])
def test_what_is_no_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--api", address]) == 2
    assert "is not an API address: write HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, {"error": "model 'x' not found"}, 3),
        (400, {"error": "bad"}, 2),
        (501, {"error": "not offered"}, 2),
        (503, {"error": "busy"}, 5),
        (500, {"error": "broken"}, 1),
        (507, {"error": "full"}, 7),
        (500, {"error": "no", "code": "engine_crashed"}, 8),
        (404, {"error": "nobody", "code": "no_providers"}, 3),
        (500, b"<html>", 1),
    ],
)
def test_the_exit_code_follows_from_the_peers_error(fake_peer: FakePeer, status: int, body: object, code: int) -> None:
    fake_peer.on("GET", "/api/tags", body, status)
    assert main(["list"]) == code


def test_something_else_at_the_address_is_told_apart_from_a_peer(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/tags", b"<html>hello</html>")
    assert main(["list"]) == 4
    assert "is not a meshmax peer" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshmax.cli.client.PeerClient.get", interrupted)
    assert main(["list"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_went_away_is_no_error() -> None:
    program = [sys.executable, "-m", "meshmax.cli.main", "docs", "--json"]
    reader = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    reader.wait()
    done = subprocess.run(program, stdout=reader.stdin, stderr=subprocess.PIPE, check=False)
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("arguments", [["help"], ["help", "run"], ["-v"]])
def test_what_people_type_for_help_and_version_is_understood(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    said = {"help": "Usage: meshmax", "-v": f"meshmax {__version__}"}[arguments[0]]
    assert said in capsys.readouterr().out


def test_with_json_an_error_is_an_object_too(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/tags", {"error": "not now", "code": "busy"}, 503)
    assert main(["list", "--json"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": "not now", "code": "busy", "exit_code": 5}
    assert main(["cp", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["code"] == "invalid_request"


def test_a_peer_that_hangs_is_told_from_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meshmax.cli.client.PROBE_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        address = f"127.0.0.1:{hung.getsockname()[1]}"
        assert main(["list", "--api", address]) == 4
        assert f"http://{address} does not answer: it hangs" in capsys.readouterr().err
    assert main(["list", "--api", address]) == 4
    assert "no meshmax peer is running here" in capsys.readouterr().err
