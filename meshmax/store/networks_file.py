"""Which networks let no UDP out, kept over restarts in ``<home>/networks.json``.

A file that cannot be read counts as none, with a warning: it costs some seconds of waiting, once. Blocking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from meshmax.core.networks import MAX_NETWORKS, BlockedNetworks
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "networks.json"
MAX_FILE_BYTES: Final = MAX_NETWORKS * 1024  # a network's name has some 20 bytes for each of our interfaces

_log = get_logger("store")


def load_networks(home: Path) -> BlockedNetworks:
    """What was kept, or nothing."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        return msgspec.json.decode(raw, type=BlockedNetworks) if raw else BlockedNetworks()
    except (OSError, msgspec.DecodeError, ValueError) as error:
        _log.warning("the file of networks cannot be read and is begun anew", error=str(error)[:200])
        return BlockedNetworks()


def save_networks(home: Path, networks: BlockedNetworks) -> None:
    """Write it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(networks))
