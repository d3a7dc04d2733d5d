"""Peers that we were connected with, kept over restarts in ``<home>/peers.json``.

The file is a list of objects: peer_id, addresses, last_seen_s, mesh. One that cannot be read counts as empty, with a
warning, and entries that are not valid are left out: lost neighbours are found again by the other rungs. Blocks briefly.
Not here: who is kept (core.known_peers).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.discovery import KnownPeer
from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import parse_peer_id
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "peers.json"
MAX_FILE_BYTES: Final = 2 << 20  # 256 peers of 8 addresses of at most 400 characters each, and their ids
MAX_ADDRESS: Final = 400  # characters of a multiaddr
MAX_MESH: Final = 128  # characters of a mesh's id

_log = get_logger("store")


def load_peers(home: Path) -> tuple[KnownPeer, ...]:
    """Who was kept."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        if raw is None and (home / FILE_NAME).exists():
            raise ValueError("it is too large")
        entries = msgspec.json.decode(raw, type=list[msgspec.Raw]) if raw else []
        return tuple(peer for entry in entries if (peer := _try_peer(entry)) is not None)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        _log.warning("the file of known peers cannot be read and is begun anew", error=str(error)[:200])
        return ()


def save_peers(home: Path, peers: Iterable[KnownPeer]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError."""
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(tuple(peers)))


def _try_peer(entry: msgspec.Raw) -> KnownPeer | None:
    try:
        peer = msgspec.json.decode(entry, type=KnownPeer)
        parse_peer_id(peer.peer_id)
    except (msgspec.DecodeError, InvalidRequest, RecursionError):
        return None
    sound = len(peer.mesh) <= MAX_MESH and all(0 < len(address) <= MAX_ADDRESS for address in peer.addresses)
    return peer if sound and peer.addresses and peer.last_seen_s >= 0 else None
