"""The bound of the status sequence over restarts."""

from pathlib import Path

import pytest

from meshmax.store.sequence_file import FILE_NAME, load_sequence, save_sequence


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_sequence(tmp_path) == 0
    save_sequence(tmp_path, 1_700_000_000_000)
    assert load_sequence(tmp_path) == 1_700_000_000_000


@pytest.mark.parametrize("raw", [b"", b"x", b"-1", b"9" * 31, b"9" * 40, b"\xff"])
def test_a_broken_file_counts_as_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    assert load_sequence(tmp_path) == 0
