"""The pages that people read: every setting stands on its page as it is, and what pages name can be found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

import meshmax
from meshmax.base.config import Config, LimitWindow, MirrorRule
from meshmax.base.errors import MeshmaxError
from meshmax.cli.main import EXIT_INTERRUPTED, main
from meshmax.cli.settings import _paths, accepted, load_config
from meshmax.core.doctor import CODES

DOCS = Path(meshmax.__file__).parent / "docs"
SETTINGS = (DOCS / "settings.md").read_text()
TROUBLES = (DOCS / "troubleshooting.md").read_text()
ROWS = {row[1].strip("`"): row for row in (re.split(r" ?\| ?", line) for line in SETTINGS.splitlines()) if len(row) > 5}


def kind_and_default(path: tuple[str, ...]) -> tuple[Any, Any]:
    kind: Any = Config
    value: Any = Config()
    for key in path:
        kind, value = get_type_hints(kind, include_extras=True)[key], getattr(value, key)
    return kind, value


@pytest.mark.parametrize("path", _paths(Config), ids=".".join)
def test_every_setting_stands_on_its_page_as_it_is(path: tuple[str, ...]) -> None:
    kind, value = kind_and_default(path)
    row = ROWS[".".join(path)]
    assert row[2] == f"`MESHMAX_{'_'.join(path).upper()}`"
    assert row[3] == accepted(kind).replace(" (comma separated in the environment)", "")
    assert row[4] == f"`{json.dumps(msgspec.to_builtins(value))}`"
    assert len(row[5]) > 10


def test_the_page_of_settings_names_no_others() -> None:
    known = {".".join(path) for path in _paths(Config)}
    assert ROWS.keys() - known <= {"Key", "---"}
    for struct in (LimitWindow, MirrorRule):
        assert all(f"`{field.encode_name}`" in SETTINGS for field in msgspec.structs.fields(struct))


def test_the_example_of_settings_is_one(tmp_path: Path) -> None:
    file = tmp_path / "meshmax.yaml"
    file.write_text(SETTINGS.partition("```yaml\n")[2].partition("```")[0])
    config = load_config({}, {}, file)
    assert (config.name, config.engine.threads, config.mirror[0].peer) == ("desktop", 6, "shelf")


def test_every_exit_code_is_explained() -> None:
    def codes(cls: type[MeshmaxError]) -> set[int]:
        return {cls.exit_code}.union(
            *(codes(sub) for sub in cls.__subclasses__() if sub.__module__.startswith("meshmax"))
        )

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLES, re.MULTILINE)}
    assert told == codes(MeshmaxError) | {0, EXIT_INTERRUPTED}


def test_every_finding_of_the_doctor_is_explained_and_no_other() -> None:
    page = TROUBLES.partition("| Finding |")[2].partition("\n\n")[0]
    told = [
        code
        for row in page.splitlines()
        for code in re.findall(r"`([a-z_]+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert sorted(told) == sorted(CODES)


def test_a_page_is_found_by_how_its_name_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "0002"]) == 0
    assert "first seen" in capsys.readouterr().out
    assert main(["docs", "settings.md"]) == 0
    assert capsys.readouterr().out.startswith("# Settings")
    assert main(["docs", "000"]) == 3
