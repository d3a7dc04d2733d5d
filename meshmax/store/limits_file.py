"""What `meshmax limit` set, kept over restarts in ``<home>/limits.json``.

A file that cannot be read counts as none, with a warning: a node without its limits is better than none. Blocking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from meshmax.core.limits import Override
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "limits.json"
MAX_FILE_BYTES: Final = 4096  # four numbers

_log = get_logger("store")


def load_override(home: Path) -> Override:
    """What was set, or nothing."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        return msgspec.json.decode(raw, type=Override) if raw else Override()
    except (OSError, msgspec.DecodeError, ValueError) as error:
        _log.warning("the file of limits cannot be read and is begun anew", error=str(error)[:200])
        return Override()


def save_override(home: Path, override: Override) -> None:
    """Write it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(override))
