"""Promised downloads over restarts."""

import errno
from pathlib import Path

import pytest

from meshmax.base.errors import StoreFull
from meshmax.base.events import Download
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Signed
from meshmax.store.disk import Disk
from meshmax.store.downloads import FILE_NAME, load_downloads, save_downloads

SIGNED = Signed(PeerId("12D3KooW"), b"payload", bytes(64))
TWO = (
    Download("ab-1", Sha256("a" * 64), ("h/n/m:t", "h/n/other:t"), True, "12D3KooW", b'{"x":1}', SIGNED),
    Download("bc-2", Sha256("b" * 64), ("h/n/m:u",)),
)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_downloads(tmp_path) == ()
    save_downloads(tmp_path, TWO)
    assert load_downloads(tmp_path) == TWO
    save_downloads(tmp_path, ())
    assert load_downloads(tmp_path) == ()


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'[{"id":"x"}]', b'[{"id":"x","digest":"y","names":[]}]', b"\xff"])
def test_a_broken_file_is_begun_anew(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    assert load_downloads(tmp_path) == ()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_downloads(tmp_path, TWO)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Disk, "write_at", full)
    with pytest.raises(StoreFull):
        save_downloads(tmp_path, ())
    assert load_downloads(tmp_path) == TWO
