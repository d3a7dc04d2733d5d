"""The file of known paths: round trip, and what cannot be read."""

import json
from pathlib import Path

import pytest

from meshmax.base.ids import peer_id_of
from meshmax.base.traversal import PathRecord
from meshmax.store.paths_file import FILE_NAME, MAX_FILE_BYTES, load_paths, save_paths

A = peer_id_of(b"\x01" * 32)
RECORD = PathRecord(A, "0123456789abcdef.-", "direct", "/ip4/10.0.0.1/tcp/11435", 1.8e9)


def test_what_is_saved_is_loaded_and_written_the_same_again(tmp_path: Path) -> None:
    save_paths(tmp_path, [RECORD])
    before = (tmp_path / FILE_NAME).read_bytes()
    save_paths(tmp_path, load_paths(tmp_path))
    assert load_paths(tmp_path) == (RECORD,)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_no_file_is_nothing(tmp_path: Path) -> None:
    assert load_paths(tmp_path) == ()


@pytest.mark.parametrize("data", [b"", b"garbage", b"{}", b"\xff" * 10, b"[1", b"[" * 100_000])
def test_a_file_that_cannot_be_read_counts_as_empty(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    assert load_paths(tmp_path) == ()


def test_a_file_that_is_too_large_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"[" + b" " * MAX_FILE_BYTES + b"]")
    assert load_paths(tmp_path) == ()


def test_entries_that_are_not_valid_are_left_out_and_the_others_kept(tmp_path: Path) -> None:
    good = {"peer_id": A, "network": "a.-", "path": "relay", "address": "", "at_s": 5}
    bad = [
        {**good, "peer_id": "nobody"},
        {**good, "path": "magic"},
        {**good, "address": "/" * 500},
        {**good, "network": "m" * 200},
        {**good, "network": ""},
        {**good, "at_s": -1},
        7,
    ]
    (tmp_path / FILE_NAME).write_text(json.dumps([*bad, good]))
    assert [record.peer_id for record in load_paths(tmp_path)] == [A]
