"""store.networks_file."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshmax.core.networks import BlockedNetworks
from meshmax.store.networks_file import FILE_NAME, MAX_FILE_BYTES, load_networks, save_networks


def test_what_was_seen_is_there_after_a_restart(tmp_path: Path) -> None:
    assert load_networks(tmp_path) == BlockedNetworks()
    save_networks(tmp_path, BlockedNetworks({"10.0.0.0/24": 5.0}))
    assert load_networks(tmp_path) == BlockedNetworks({"10.0.0.0/24": 5.0})


@pytest.mark.parametrize("content", ['{"seen": 1}', "{", '{"other": {}}', " " * (MAX_FILE_BYTES + 1)])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    assert load_networks(tmp_path) == BlockedNetworks()
