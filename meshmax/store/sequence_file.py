"""How far the sequence of our statuses may have come, kept over restarts in ``<home>/sequence``, a decimal number.

A file that cannot be read counts as none, with a warning: then the clock alone says where to go on. Not here: what the
number means (core.sequence).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "sequence"
MAX_FILE_BYTES: Final = 32  # of a number of at most 62 bits
# Of the year 5138: above it peers' own bound comes near, and no clock that was ever right led here.
MAX_KEPT: Final = 10**14

_log = get_logger("store")


def load_sequence(home: Path) -> int:
    """The bound that was kept, or 0; blocks briefly."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        number = int(raw.decode("ascii")) if raw else 0
        if not 0 <= number <= MAX_KEPT:
            raise ValueError(f"{number} is out of bounds")
        return number
    except (OSError, ValueError) as error:
        _log.warning("the file of the status sequence cannot be read and is begun anew", error=str(error)[:200])
        return 0


def save_sequence(home: Path, bound: int) -> None:
    """Write it, or leave the old file. Raises StoreFull, StoreError; blocks briefly."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, str(bound).encode())
