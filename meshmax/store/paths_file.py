"""How peers were reached, kept over restarts in ``<home>/paths.json``.

The file is a list of objects: peer_id, network, path, address, at_s. One that cannot be read counts as empty, with a warning,
and entries that are not valid are left out: what is lost is found out again by dialling. Blocks briefly. Not here: what is kept
(core.path_memory).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import parse_peer_id
from meshmax.base.traversal import PathRecord
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "paths.json"
MAX_FILE_BYTES: Final = 4 << 20  # 1024 peers of 4 records of some 250 bytes, with room for the longest addresses
MAX_ADDRESS: Final = 400  # characters of a multiaddr
MAX_NETWORK: Final = 64  # characters of a fingerprint

_log = get_logger("store")


def load_paths(home: Path) -> tuple[PathRecord, ...]:
    """What was kept."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        if raw is None and (home / FILE_NAME).exists():
            raise ValueError("it is too large")
        entries = msgspec.json.decode(raw, type=list[msgspec.Raw]) if raw else []
        return tuple(record for entry in entries if (record := _try_record(entry)) is not None)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        _log.warning("the file of known paths cannot be read and is begun anew", error=str(error)[:200])
        return ()


def save_paths(home: Path, records: Iterable[PathRecord]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(tuple(records)))


def _try_record(entry: msgspec.Raw) -> PathRecord | None:
    try:
        record = msgspec.json.decode(entry, type=PathRecord)
        parse_peer_id(record.peer_id)
    except (msgspec.DecodeError, InvalidRequest, RecursionError):
        return None
    sound = len(record.address) <= MAX_ADDRESS and 0 < len(record.network) <= MAX_NETWORK
    return record if sound and record.at_s >= 0 else None
