"""What each name meant when this node first heard of it, and from whom, kept over restarts in ``<home>/names.json``.

The file maps a name to "DIGEST" (named here, or by an older version that did not note by whom) or "DIGEST PEERID".

A file that cannot be read counts as empty, with a warning: the pins are a protection, and losing them must not keep a node
from starting. Not here: what the pins are for (core.catalog).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.catalog import FirstOffer
from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import parse_peer_id, parse_sha256
from meshmax.store.disk import Disk, translated, try_read
from meshmax.telemetry.log import get_logger

FILE_NAME: Final = "names.json"
MAX_FILE_BYTES: Final = 4 << 20  # 4096 names of at most 600 characters, a digest and a PeerId each

_log = get_logger("store")


def load_first_seen(home: Path) -> dict[str, FirstOffer]:
    """Name key to what it meant, oldest first; blocks briefly."""
    try:
        raw = try_read(home / FILE_NAME, MAX_FILE_BYTES)
        names = msgspec.json.decode(raw, type=dict[str, str]) if raw else {}
        return {key: _offer(text) for key, text in names.items()}
    except (OSError, msgspec.DecodeError, InvalidRequest, ValueError) as error:
        _log.warning("the file of first seen names cannot be read and is begun anew", error=str(error)[:200])
        return {}


def save_first_seen(home: Path, offers: Mapping[str, FirstOffer]) -> None:
    """Write all of it, or leave the old file. Raises StoreFull, StoreError; blocks briefly."""
    texts = {key: f"{offer.digest} {offer.origin}".rstrip() for key, offer in offers.items()}
    with translated(f"{home / FILE_NAME} was not written"):
        Disk().write_whole(home / FILE_NAME, msgspec.json.encode(texts))


def _offer(text: str) -> FirstOffer:
    digest, _, origin = text.partition(" ")
    return FirstOffer(parse_sha256(digest), parse_peer_id(origin) if origin else "")
