from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

DIGEST = "ab" * 32
HAVE = {
    "meshmax_have": 1,
    "peer": "12D3KooWx",
    "listed_at_s": 1,
    "mesh": False,
    "models": [{"name": "small:latest", "digest": DIGEST}],
    "blobs": [DIGEST],
    "partials": [],
}
EXPORTED = Lines(
    [
        {"status": "exporting small-latest", "total": 10, "completed": 10},
        {"status": "success", "files": ["/stick/small-latest.meshmax"], "size": 10},
    ]
)


def test_export_sends_names_and_an_absolute_path_and_prints_the_files(
    fake_peer: FakePeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_peer.on("POST", "/api/v1/models/export", EXPORTED)
    assert main(["export", "small", "other", "--to", "stick"]) == 0
    assert fake_peer.bodies("/api/v1/models/export") == [
        {"models": ["small", "other"], "to": str(tmp_path / "stick"), "split": 0}
    ]
    assert capsys.readouterr().out.splitlines()[-2:] == ["success", "/stick/small-latest.meshmax"]


@pytest.mark.parametrize(
    ("given", "sent"), [(["--split", "4GB"], "4GB"), (["--split"], "fat32"), (["--split", "fat32"], "fat32"), ([], 0)]
)
def test_split_takes_a_size_or_what_fat32_takes(fake_peer: FakePeer, given: list[str], sent: str | int) -> None:
    fake_peer.on("POST", "/api/v1/models/export", EXPORTED)
    assert main(["export", "small", "--to", "/stick", *given]) == 0
    assert fake_peer.bodies("/api/v1/models/export")[0]["split"] == sent


def test_a_split_that_is_no_size_is_refused_before_anything_is_asked(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "small", "--to", "/stick", "--split", "huge"]) == 2
    assert "4GB" in capsys.readouterr().err
    assert fake_peer.asked == []


def test_lacking_is_read_from_a_file_or_standard_input(
    fake_peer: FakePeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_peer.on("POST", "/api/v1/models/export", EXPORTED)
    text = json.dumps(HAVE).encode()
    (tmp_path / "list").write_bytes(text)
    assert main(["export", "small", "--to", "/stick", "--lacking", str(tmp_path / "list")]) == 0
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    assert main(["export", "small", "--to", "/stick", "--lacking", "-"]) == 0
    assert [body["lacking"] for body in fake_peer.bodies("/api/v1/models/export")] == [HAVE, HAVE]


def test_a_list_that_is_none_is_refused_before_anything_is_asked(
    fake_peer: FakePeer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text("small:latest\n")
    assert main(["export", "small", "--to", "/stick", "--lacking", str(tmp_path / "list")]) == 2
    assert "meshmax have --list" in capsys.readouterr().err
    assert main(["export", "small", "--to", "/stick", "--lacking", str(tmp_path / "nothing")]) == 2
    assert fake_peer.asked == []


def test_import_sends_absolute_paths_and_shows_who_exported(
    fake_peer: FakePeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_peer.on(
        "POST",
        "/api/v1/models/import",
        Lines([{"status": "small: small:latest, exported by site-a (12D3KooWx)"}, {"status": "success"}]),
    )
    assert main(["import", "a.meshmax", "/stick", "--alone"]) == 0
    assert fake_peer.bodies("/api/v1/models/import") == [
        {"paths": [str(tmp_path / "a.meshmax"), "/stick"], "alone": True}
    ]
    assert "exported by site-a" in capsys.readouterr().out


def test_an_import_that_lacks_a_part_ends_with_the_code_of_what_is_missing(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/v1/models/import", Lines([{"error": "number 2 are missing", "code": "blob_not_found"}]))
    assert main(["import", "/stick"]) == 3
    assert "number 2 are missing" in capsys.readouterr().err


def test_have_shows_names_and_lists_for_the_other_site(
    fake_peer: FakePeer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/have?mesh=false", HAVE)
    fake_peer.on("GET", "/api/v1/have?mesh=true", HAVE | {"mesh": True})
    assert main(["have"]) == 0
    assert "small:latest" in capsys.readouterr().out
    assert main(["have", "--list"]) == 0
    assert json.loads(capsys.readouterr().out) == HAVE
    assert main(["have", "--mesh", "--list", "--to", str(tmp_path / "list")]) == 0
    assert json.loads((tmp_path / "list").read_text())["mesh"] is True
    assert main(["have", "--json"]) == 0
    assert main(["have", "--list", "--to", "/nowhere/at/all"]) == 2
