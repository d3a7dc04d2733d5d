"""Pins of names over restarts."""

from pathlib import Path

import pytest

from meshmax.base.catalog import FirstOffer
from meshmax.base.ids import Sha256, peer_id_of
from meshmax.store.first_seen import FILE_NAME, load_first_seen, save_first_seen

A = Sha256("a" * 64)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_first_seen(tmp_path) == {}
    offers = {"h/n/m:t": FirstOffer(A, peer_id_of(b"k" * 32)), "h/n/own:t": FirstOffer(A)}
    save_first_seen(tmp_path, offers)
    assert load_first_seen(tmp_path) == offers


def test_a_file_of_a_version_that_did_not_note_by_whom_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(f'{{"h/n/m:t": "{A}"}}')
    assert load_first_seen(tmp_path) == {"h/n/m:t": FirstOffer(A)}


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"x":"y"}', b'{"x":"' + A.encode() + b' nobody"}', b"\xff"])
def test_a_broken_file_is_begun_anew(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    assert load_first_seen(tmp_path) == {}
