"""store.limits_file."""

from __future__ import annotations

from pathlib import Path

from meshmax.core.limits import Override
from meshmax.store.limits_file import FILE_NAME, load_override, save_override


def test_what_was_set_is_there_after_a_restart(tmp_path: Path) -> None:
    assert load_override(tmp_path) == Override()
    save_override(tmp_path, Override(up=1_000_000, down=0))
    assert load_override(tmp_path) == Override(up=1_000_000, down=0)


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"up": "very"')
    assert load_override(tmp_path) == Override()
