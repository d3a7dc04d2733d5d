"""Home: one node at a time, and a way for command lines to find it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
import trio

from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId
from meshmax.store.home import is_held, open_home, read_run

PEER = PeerId("12D3KooWx")


async def test_a_home_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    async with open_home(tmp_path / "new" / "home") as home:
        assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


async def test_the_api_is_found_while_the_node_runs_and_not_after(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    async with open_home(tmp_path) as home:
        assert read_run(tmp_path) is None
        home.write_run("http://127.0.0.1:11434", PEER, 12.5)
        run = read_run(tmp_path)
        assert run is not None
        assert (run.pid, run.api, run.peer_id, run.started_at) == (os.getpid(), "http://127.0.0.1:11434", PEER, 12.5)
    assert read_run(tmp_path) is None
    assert not (tmp_path / "run.json").exists()


async def test_a_home_is_held_from_before_its_api_is_there(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    async with open_home(tmp_path):
        assert is_held(tmp_path)
        assert read_run(tmp_path) is None
    assert not is_held(tmp_path)


async def test_a_second_node_on_a_home_is_refused_by_name(tmp_path: Path, autojump_clock: object) -> None:
    async with open_home(tmp_path) as home:
        home.write_run("http://x", PEER, 1.0)
        with pytest.raises(ConfigError, match=rf"another meshmax peer \(pid {os.getpid()}\) is running on {tmp_path}"):
            async with open_home(tmp_path):
                pass
        assert read_run(tmp_path) is not None
    async with open_home(tmp_path):
        pass


async def test_what_a_killed_node_left_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"pid":1,"api":"http://x","peer_id":"p","started_at":1.0}')
    assert read_run(tmp_path) is None
    (tmp_path / "lock").write_text("1")
    assert read_run(tmp_path) is None
    async with open_home(tmp_path):
        assert read_run(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid":"x"}', "\0" * 100])
async def test_a_damaged_run_file_is_no_node(tmp_path: Path, content: str) -> None:
    async with open_home(tmp_path) as home:
        (home.path / "run.json").write_text(content)
        assert read_run(tmp_path) is None


async def test_a_home_that_cannot_be_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--home"):
            async with open_home(path):
                pass


@pytest.mark.loopback
async def test_a_home_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="cannot be used"):
            async with open_home(tmp_path):
                pass
        return
    # Root may write anywhere: look through the eyes of nobody.
    tmp_path.chmod(0o555)
    code = (
        "import os, sys, trio\n"
        "from pathlib import Path\n"
        "from meshmax.store.home import open_home\n"
        "from meshmax.base.errors import ConfigError\n"
        "os.setuid(65534)\n"
        "async def main():\n"
        "    async with open_home(Path(sys.argv[1])): pass\n"
        "try: trio.run(main)\n"
        "except ConfigError as error: print(error.message)\n"
    )
    done = await trio.run_process([sys.executable, "-c", code, str(tmp_path / "home")], capture_stdout=True)
    assert b"cannot be used" in done.stdout
