"""The downloads that this node is to finish whoever watches, kept over restarts in ``<home>/downloads.json``.

A file that cannot be read counts as empty, with a warning: what was fetched of them is kept in any case, and a person can
begin them again. Not here: which there are and when they are kept (services.pull).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import InvalidRequest
from meshmax.base.events import Download
from meshmax.base.ids import parse_sha256
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "downloads.json"
MAX_FILE_BYTES: Final = 64 << 20  # 32 downloads, each with a manifest and a record of at most half a MiB, in base64

_log = get_logger("store")


def load_downloads(home: Path) -> tuple[Download, ...]:
    """What was kept; blocks briefly."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        downloads = msgspec.json.decode(raw, type=tuple[Download, ...]) if raw else ()
        for download in downloads:
            parse_sha256(download.digest)
    except (OSError, msgspec.DecodeError, InvalidRequest, ValueError) as error:
        _log.warning("the file of downloads cannot be read and is begun anew", error=str(error)[:200])
        return ()
    return downloads


def save_downloads(home: Path, downloads: tuple[Download, ...]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError; blocks briefly."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(downloads))
