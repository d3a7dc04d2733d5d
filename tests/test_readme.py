"""The README's claims about commands: that they exist, take what it shows, and print what it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from meshmax.base.membership import OPEN_MESH, SCOPES, MeshView
from meshmax.cli.main import _COMMANDS, main, make_app
from meshmax.cli.peer import banner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = re.findall(r"^\$ meshmax (.+)$", README, re.MULTILINE)
LOCAL = {"peer", "docs"}  # these ask no peer


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_that_it_shows_is_one(line: str) -> None:
    command, bound, _ = make_app().parse_args(shlex.split(line), exit_on_error=False, print_error=False)
    assert callable(command)
    assert bound.args or bound.kwargs or " " not in line


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/\w+", README))))
def test_every_script_that_it_names_is_there_and_may_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111


def test_every_command_that_asks_a_peer_takes_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    for names, _, _ in _COMMANDS:
        name = names if isinstance(names, str) else names[0]
        assert main([name, "--help"]) == 0
        told = capsys.readouterr().out
        if name not in LOCAL:
            assert all(flag in told for flag in ("--json", "--home", "--api")), name


def test_the_banner_is_the_one_that_it_shows() -> None:
    shown = README.partition("$ meshmax peer --name desktop\n")[2].partition("```")[0].splitlines()
    facts = {
        "name": "desktop",
        "peer_id": re.findall(r"\((\w+)\)", shown[0])[0],
        "lan": True,
        "mesh": MeshView(OPEN_MESH, "", root=False, scopes=SCOPES),
        "addresses": [shown[3].split()[1]],
        "models": 0,
        "home": "/home/me/.meshmax",
    }
    assert banner(facts, "http://127.0.0.1:11434", "").splitlines() == shown
