"""Identity: made once, kept for good, closed to others, never overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meshmax.base.errors import ConfigError
from meshmax.base.ids import public_key_of
from meshmax.store.identity import load_identity


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    first = load_identity(tmp_path)
    assert load_identity(tmp_path).peer_id == first.peer_id
    assert load_identity(tmp_path).private_bytes == first.private_bytes
    assert len(first.private_bytes) == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity.key"]


def test_only_its_owner_may_read_the_key(tmp_path: Path) -> None:
    load_identity(tmp_path)
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


def test_a_key_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    peer_id = load_identity(tmp_path).peer_id
    (tmp_path / "identity.key").chmod(0o644)
    assert load_identity(tmp_path).peer_id == peer_id
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


def test_the_signature_is_of_the_key_that_the_peer_id_shows(tmp_path: Path) -> None:
    identity = load_identity(tmp_path)
    Ed25519PublicKey.from_public_bytes(public_key_of(identity.peer_id)).verify(identity.sign(b"data"), b"data")
    assert Ed25519PrivateKey.from_private_bytes(identity.private_bytes).sign(b"data") == identity.sign(b"data")


def test_the_key_is_not_shown(tmp_path: Path) -> None:
    identity = load_identity(tmp_path)
    assert repr(identity) == f"Identity({identity.peer_id})"


_OTHER_KIND = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("content", [b"", b"garbage", _OTHER_KIND, b"\0" * 5000])
def test_a_damaged_key_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="put back a copy of it, or move it away"):
        load_identity(tmp_path)
    assert path.read_bytes() == content


def test_a_truncated_key_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path)
    path = tmp_path / "identity.key"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            load_identity(tmp_path)


def test_a_key_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "identity.key").mkdir()
    with pytest.raises(ConfigError, match="cannot be used"):
        load_identity(tmp_path)
