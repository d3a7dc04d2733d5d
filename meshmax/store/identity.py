"""Identity: the node's Ed25519 key, made on first start and kept in ``identity.key``.

The file is PKCS #8 PEM (RFC 5958, RFC 8410), mode 0600, created whole or not at all and never overwritten: with another
key we would be another peer. A file that others may read is closed to them, with a warning, since the key may be known
already. Not here: what is signed (wire.signed).
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId, peer_id_of
from meshmax.store.disk import Disk, temp_name
from meshmax.telemetry.log import get_logger

KEY_FILE: Final = "identity.key"
_MAX_KEY_BYTES: Final = 4096
_log = get_logger("identity")


class Identity:
    """ports.Signer with our key. The key is not shown by repr."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id: PeerId = peer_id_of(key.public_key().public_bytes_raw())

    @property
    def private_bytes(self) -> bytes:
        """The raw 32-byte private key, for the transport's handshake."""
        return self._key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """See ports.Signer."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def load_identity(home: Path) -> Identity:
    """The identity of this home, made if there is none. Raises ConfigError that says what to do; blocks briefly."""
    path = home / KEY_FILE
    try:
        if not path.exists():
            create_key(path)
    except OSError as error:
        raise ConfigError(f"the identity {path} cannot be used: {error.strerror}; check its owner and mode") from None
    return load_key(path, "identity", "put back a copy of it, or move it away to become a new peer with a new PeerId")


def load_key(path: Path, what: str, remedy: str) -> Identity:
    """The key at ``path``, closed to others. Raises ConfigError with ``what`` it is and the ``remedy`` for a damaged one."""
    try:
        _close_to_others(path, what)
        with path.open("rb") as file:
            pem = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be used: {error.strerror}; check its owner and mode") from None
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the {what} {path} is damaged: {remedy}")
    return Identity(key)


def create_key(path: Path, key: Ed25519PrivateKey | None = None) -> None:
    """Write a key, a new one if none is given; what is there already stays. Raises OSError."""
    pem = (key or Ed25519PrivateKey.generate()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    disk, temp = Disk(), temp_name(path.parent)
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            disk.write_at(fd, pem, 0)
            disk.sync(fd)
        finally:
            os.close(fd)
        with suppress(FileExistsError):
            # A link fails where a rename would overwrite: whoever was first has made the identity.
            os.link(temp, path)
        disk.sync_folder(path.parent)
    finally:
        disk.unlink(temp)


def _close_to_others(path: Path, what: str) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        path.chmod(0o600)
        _log.warning(f"the {what} could be read by others; its mode is 0600 now", path=str(path), mode=oct(mode))
