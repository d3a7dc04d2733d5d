"""What the DHT knows, on disk."""

from pathlib import Path

from meshmax.base.membership import MeshId
from meshmax.store.dht_file import FILE_NAME, load_dht, save_dht


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    assert load_dht(tmp_path) == b""
    save_dht(tmp_path, b"state\nwith lines")
    assert load_dht(tmp_path) == b"state\nwith lines"


def test_what_another_mesh_knew_is_not_given_out(tmp_path: Path) -> None:
    save_dht(tmp_path, b"state", MeshId("12D3one"))
    assert load_dht(tmp_path, MeshId("12D3one")) == b"state"
    assert load_dht(tmp_path, MeshId("12D3two")) == load_dht(tmp_path) == b""


def test_a_file_that_is_not_ours_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff" * 100)
    assert load_dht(tmp_path) == b""
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    assert load_dht(tmp_path) == b""
