"""Which models the partials here belong to, kept over restarts in ``<home>/leftovers.json``.

A file that cannot be read counts as empty, with a warning: the partials stay, and pulls go on from them in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import Sha256, parse_sha256
from meshmax.base.names import parse_name
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "leftovers.json"
MAX_FILE_BYTES: Final = 4 << 20  # 256 names with at most 64 blobs each

_log = get_logger("store")


def load_leftovers(home: Path) -> dict[str, dict[Sha256, int]]:
    """Name to its blobs' digests and sizes; blocks briefly."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        names = msgspec.json.decode(raw, type=dict[str, dict[str, int]]) if raw else {}
        return {
            str(parse_name(name)): {parse_sha256(digest): size for digest, size in blobs.items()}
            for name, blobs in names.items()
        }
    except (OSError, msgspec.DecodeError, InvalidRequest, ValueError) as error:
        _log.warning("the file of interrupted pulls cannot be read and is begun anew", error=str(error)[:200])
        return {}


def save_leftovers(home: Path, begun: Mapping[str, Mapping[Sha256, int]]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError; blocks briefly."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode({name: dict(blobs) for name, blobs in begun.items()}))
