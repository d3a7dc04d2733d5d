"""Pins and last uses over restarts."""

from pathlib import Path

import pytest

from meshmax.base.errors import ConfigError
from meshmax.base.ids import Sha256
from meshmax.store.sweep_files import (
    MAX_FILE_BYTES,
    PINS_FILE,
    USES_FILE,
    load_pins,
    load_uses,
    save_pins,
    save_uses,
)

A, B = Sha256("a" * 64), Sha256("b" * 64)


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    save_pins(tmp_path, {"registry.ollama.ai/library/llama3:latest": A})
    save_uses(tmp_path, {A: 1.5, B: 2.0})
    assert load_pins(tmp_path) == {"registry.ollama.ai/library/llama3:latest": A}
    assert load_uses(tmp_path) == {A: 1.5, B: 2.0}


def test_a_new_home_has_none(tmp_path: Path) -> None:
    assert load_pins(tmp_path) == {}
    assert load_uses(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a":"short"}', b'{"a":1}', b" " * (MAX_FILE_BYTES + 1)])
def test_pins_that_cannot_be_read_keep_the_peer_from_starting_and_sweeping(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PINS_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="nobody knows which models are pinned"):
        load_pins(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a":1.0}', b'{"' + b"a" * 64 + b'":"x"}'])
def test_uses_that_cannot_be_read_are_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / USES_FILE).write_bytes(content)
    assert load_uses(tmp_path) == {}
