"""What the DHT knows, kept over restarts in ``<home>/dht``: bytes that only net.dht reads.

They begin with a line that names the mesh they are of: another mesh's are not given out. A file that cannot be read, or
is too large to be ours, counts as none, with a warning: the DHT then begins anew. Not here: what is in it, and that nothing
in it is believed unchecked (net.dht).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.core.provider_records import MAX_DUMPED_BYTES
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "dht"
MAX_FILE_BYTES: Final = MAX_DUMPED_BYTES + (64 << 10)  # and 200 contacts

_log = get_logger("store")


def load_dht(home: Path, mesh: MeshId = OPEN_MESH) -> bytes:
    """What was kept of this mesh's DHT, b"" for nothing; blocks briefly."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES) or b""
    except OSError as error:
        _log.warning("what was kept of the DHT cannot be read; it begins anew", error=str(error)[:200])
        return b""
    line, _, state = raw.partition(b"\n")
    return state if line == _line(mesh) else b""


def save_dht(home: Path, state: bytes, mesh: MeshId = OPEN_MESH) -> None:
    """Write it, or leave the old file. Raises StoreFull, StoreError; blocks briefly."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, _line(mesh) + b"\n" + state)


def _line(mesh: MeshId) -> bytes:
    return b"meshmax dht 1 " + mesh.encode()
