"""Pins of names over restarts."""

from pathlib import Path

import pytest

from meshmax.base.ids import Sha256
from meshmax.store.first_seen import FILE_NAME, load_first_seen, save_first_seen

A = Sha256("a" * 64)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_first_seen(tmp_path) == {}
    save_first_seen(tmp_path, {"h/n/m:t": A})
    assert load_first_seen(tmp_path) == {"h/n/m:t": A}


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"x":"y"}', b"\xff"])
def test_a_broken_file_is_begun_anew(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    assert load_first_seen(tmp_path) == {}
