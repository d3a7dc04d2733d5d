"""Whose program listens at a port."""

import os
import socket
import sys
from pathlib import Path

import pytest

from meshmax.engine.listener import owners, strangers

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ROW = "   {n}: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  {uid}        0 7247666 1 0 100 0\n"


def table(folder: Path, name: str, *rows: tuple[str, str, int]) -> Path:
    path = folder / name
    lines = (ROW.format(n=n, local=local, state=state, uid=uid) for n, (local, state, uid) in enumerate(rows))
    path.write_text(HEAD + "".join(lines))
    return path


def test_who_listens_is_found_in_both_tables_and_nobody_else(tmp_path: Path) -> None:
    four = table(tmp_path, "4", ("0100007F:2CAA", "0A", 1001), ("0100007F:2CAA", "01", 7), ("0100007F:2CAB", "0A", 8))
    six = table(tmp_path, "6", ("0" * 32 + ":2CAA", "0A", 998))
    assert owners(0x2CAA, (four, six)) == {1001, 998}
    assert owners(80, (four, six)) == set()


@pytest.mark.parametrize("text", ["", "head\n\n  junk\n", "head\n a b:2CAA c 0A e f g notanumber h\n", "head\n\xff\n"])
def test_what_is_no_table_tells_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(text, "latin-1")
    assert owners(0x2CAA, (tmp_path / "tcp", tmp_path / "nothing")) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="the table is Linux's")
def test_our_own_server_is_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert owners(server.getsockname()[1]) == {os.getuid()}


def test_other_people_are_strangers_and_the_system_is_none() -> None:
    assert strangers({0, 998, 1000, 1001, 61500, 65534, 100_000}, own=1000) == [1001, 65534, 100_000]
    assert strangers((), own=0) == []
