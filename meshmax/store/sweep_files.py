"""Pins and last uses, kept over restarts in ``<home>/pins.json`` and ``<home>/uses.json``.

Lost uses cost a worse order at the next sweep: a file of them that cannot be read counts as empty, with a warning. A file
of pins that cannot be read is an error: without it a sweep would take what a person asked to keep. Blocking.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import Sha256, parse_sha256
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

PINS_FILE: Final = "pins.json"
USES_FILE: Final = "uses.json"
MAX_FILE_BYTES: Final = 4 << 20  # 4096 names of at most 600 characters, and a digest each

_log = get_logger("store")


def load_pins(home: Path) -> dict[str, Sha256]:
    """A name's key -> digest. Raises ConfigError if the file is there and cannot be read."""
    path = home / PINS_FILE
    try:
        raw = try_read(path, MAX_FILE_BYTES)
        if raw is None and path.exists():
            raise InvalidRequest("it is too large")
        pins = msgspec.json.decode(raw, type=dict[str, str]) if raw is not None else {}
        return {key: parse_sha256(digest) for key, digest in pins.items()}
    except (OSError, msgspec.DecodeError, InvalidRequest, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read, so nobody knows which models are pinned: {str(error)[:200]}."
            " Repair it, or remove it and pin them again"
        ) from None


def save_pins(home: Path, pins: Mapping[str, Sha256]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / PINS_FILE} was not written"):
        Disk().write_whole(home / PINS_FILE, msgspec.json.encode(dict(pins)))


def load_uses(home: Path) -> dict[Sha256, float]:
    """Digest -> Unix time of the last use."""
    try:
        raw = try_read(home / USES_FILE, MAX_FILE_BYTES)
        uses = msgspec.json.decode(raw, type=dict[str, float]) if raw else {}
        return {parse_sha256(digest): time_s for digest, time_s in uses.items()}
    except (OSError, msgspec.DecodeError, InvalidRequest, ValueError) as error:
        _log.warning("the file of last uses cannot be read and is begun anew", error=str(error)[:200])
        return {}


def save_uses(home: Path, uses: Mapping[Sha256, float]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / USES_FILE} was not written"):
        Disk().write_whole(home / USES_FILE, msgspec.json.encode(dict(uses)))
