"""A slow full check of every blob, so that a disk that rots is found before somebody needs the model.

One blob at a time, with a pause between, each about once in ``scrub_interval_s``. A blob with bad chunks becomes a partial
without them (BlobStore.verify) and its model leaves our list until it is pulled again. Not here: the check before a
chunk is served or a model is loaded (store).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.ids import Sha256
from meshmax.base.model import StoredModel
from meshmax.ports import BlobStore
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

SHORTEST_PAUSE_S: Final = 30.0  # between two blobs, so that a scrub never keeps a disk busy

_log = get_logger("scrub")


async def run_scrub(
    blobs: BlobStore,
    local: Callable[[], tuple[StoredModel, ...]],
    refresh: Callable[[], Awaitable[None]],
    interval_s: float,
) -> NoReturn:
    """Check forever; ``refresh`` is called after a blob turned out to be damaged."""
    while True:
        digests = list(dict.fromkeys(layer.digest for stored in local() for layer in stored.manifest.blobs))
        pause_s = max(interval_s / max(len(digests), 1), SHORTEST_PAUSE_S)
        await trio.sleep(pause_s)
        for digest in digests:
            await isolate("scrub", partial(_check, blobs, digest, refresh))
            await trio.sleep(pause_s)


async def _check(blobs: BlobStore, digest: Sha256, refresh: Callable[[], Awaitable[None]]) -> None:
    haves = await blobs.verify(digest)
    if not haves.whole:
        _log.warning("a blob is damaged: pull its model again", blob=digest, bad_chunks=haves.count - haves.total)
        await refresh()
