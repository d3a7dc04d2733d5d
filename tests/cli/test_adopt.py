from __future__ import annotations

from pathlib import Path

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

PATH = "/api/v1/models/adopt"
LINES = Lines(
    [
        {"status": "linked llama3:8b", "name": "llama3:8b", "way": "linked", "size": 10},
        {"status": "success", "adopted": 1, "passed": 2, "size": 4_700_000_000},
    ]
)


def test_the_usual_folder_is_found_where_none_is_named(
    fake_peer: FakePeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    fake_peer.on("POST", PATH, LINES)
    assert main(["add", "--from-ollama"]) == 0
    assert fake_peer.bodies(PATH) == [{"from": "ollama", "path": str(tmp_path)}]
    out = capsys.readouterr().out.splitlines()
    assert out == ["linked llama3:8b", "1 models of 4.7 GB taken in without copying, 2 passed over"]


def test_a_named_folder_is_taken(fake_peer: FakePeer, tmp_path: Path) -> None:
    fake_peer.on("POST", PATH, LINES)
    assert main(["add", "--from-huggingface", str(tmp_path)]) == 0
    assert fake_peer.bodies(PATH) == [{"from": "huggingface", "path": str(tmp_path)}]


def test_a_folder_that_is_not_there_is_an_error(fake_peer: FakePeer, tmp_path: Path) -> None:
    assert main(["add", "--from-ollama", str(tmp_path / "none")]) == 2
    assert fake_peer.asked == []


@pytest.mark.parametrize("words", [["add"], ["add", "name"], ["add", "x", "--from-ollama", "."]])
def test_what_is_not_enough_or_too_much_says_what_to_give(
    fake_peer: FakePeer, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "NAME" in capsys.readouterr().err
