"""What is seen of a machine and a home without a peer."""

import os
import socket
from pathlib import Path

import pytest

from meshmax.base.config import Config, EngineConfig
from meshmax.net.local_ports import port_holder
from meshmax.services.checkup import check_machine
from meshmax.store.identity import KEY_FILE, load_identity

ECHO = EngineConfig(kind="echo")


def check(home: Path, now_s: float | None = None, config: Config | None = None, running: bool = True):  # type: ignore[no-untyped-def]
    config = config or Config(home=str(home), engine=ECHO)
    now_s = now_s if now_s is not None else (home.stat().st_mtime if home.exists() else 0.0)
    return check_machine(config, ("10.0.0.1",), now_s, running=running)


def test_a_home_that_is_not_there_yet_is_no_problem(tmp_path: Path) -> None:
    facts = check(tmp_path / "new")
    assert (facts.home_problem, facts.identity_problem, facts.clock_back_s) == ("", "", 0.0)
    assert not (tmp_path / "new").exists()
    assert facts.disk_free_bytes


def test_a_home_that_is_a_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("x")
    assert "is not a folder" in check(tmp_path / "home").home_problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_may_not_be_written_is_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o500)
    assert "may not be" in check(tmp_path / "home").home_problem


def test_an_identity_that_is_damaged_is_one_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("garbage")
    assert check(tmp_path).identity_problem
    assert (tmp_path / KEY_FILE).read_text() == "garbage"


def test_no_identity_is_made(tmp_path: Path) -> None:
    check(tmp_path)
    assert not (tmp_path / KEY_FILE).exists()


def test_a_clock_that_was_set_back_is_known_by_the_files_of_the_home(tmp_path: Path) -> None:
    load_identity(tmp_path)
    now_s = (tmp_path / KEY_FILE).stat().st_mtime - 10_800
    assert check(tmp_path, now_s).clock_back_s == pytest.approx(10_800, abs=1)
    assert check(tmp_path, now_s + 20_000).clock_back_s == 0.0


def test_an_engine_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "xllamacpp" in check(tmp_path, config=Config(home=str(tmp_path))).engine_problem
    assert check(tmp_path).engine_problem == ""


def test_ports_are_looked_at_only_where_no_peer_runs(tmp_path: Path) -> None:
    assert check(tmp_path, running=True).ports == ()
    config = Config(home=str(tmp_path), engine=ECHO, api="127.0.0.1:1", listen=("127.0.0.1:0",), lanes_per_peer=0)
    assert check(tmp_path, config=config, running=False).ports == ()


def test_who_holds_a_port_is_told() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert port_holder("127.0.0.1", port)
    assert port_holder("127.0.0.1", port) == ""
