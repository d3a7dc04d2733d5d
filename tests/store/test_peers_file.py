"""The file of known peers: round trip, and what cannot be read."""

import json
from pathlib import Path

import pytest

from meshmax.base.discovery import KnownPeer
from meshmax.base.ids import peer_id_of
from meshmax.store.peers_file import FILE_NAME, MAX_FILE_BYTES, load_peers, save_peers

A = peer_id_of(b"\x01" * 32)
PEER = KnownPeer(A, ("/ip4/10.0.0.1/tcp/11435",), 1.8e9, "mesh")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_peers(tmp_path, [PEER])
    assert load_peers(tmp_path) == (PEER,)


def test_no_file_is_nobody(tmp_path: Path) -> None:
    assert load_peers(tmp_path) == ()


@pytest.mark.parametrize("data", [b"", b"garbage", b"{}", b"\xff" * 10, b"[1", b"[" * 100_000])
def test_a_file_that_cannot_be_read_counts_as_empty(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    assert load_peers(tmp_path) == ()


def test_a_file_that_is_too_large_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"[" + b" " * MAX_FILE_BYTES + b"]")
    assert load_peers(tmp_path) == ()


def test_entries_that_are_not_valid_are_left_out_and_the_others_kept(tmp_path: Path) -> None:
    good = {"peer_id": A, "addresses": ["/ip4/10.0.0.1/tcp/1"], "last_seen_s": 5}
    bad = [
        {**good, "peer_id": "nobody"},
        {**good, "addresses": []},
        {**good, "addresses": ["/" * 500]},
        {**good, "mesh": "m" * 200},
        {**good, "last_seen_s": -1},
        7,
    ]
    (tmp_path / FILE_NAME).write_text(json.dumps([*bad, good]))
    assert [peer.peer_id for peer in load_peers(tmp_path)] == [A]
