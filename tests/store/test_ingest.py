"""What is refused before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshmax.base.errors import InvalidRequest
from meshmax.store.ingest import read_header


def test_a_pipe_or_a_folder_is_refused_and_holds_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match="not a file"):
        read_header(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(IsADirectoryError):
        read_header(tmp_path)
    assert len(os.listdir("/dev/fd")) == before
