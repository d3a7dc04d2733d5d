"""open_store: the store of one node, from two folders.

The models folder may be Ollama's own (``~/.ollama/models``): nothing in it is changed but what a person asks for. The
state folder is ours alone. One process at a time has a state folder open (store.home sees to that).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshmax.base.errors import ConfigError
from meshmax.ports import RunSync
from meshmax.store.blobs import FileBlobStore
from meshmax.store.disk import Disk, translated
from meshmax.store.layout import Layout
from meshmax.store.models import FileModelStore
from meshmax.store.staging import Staging


class Store:
    """Blobs, the models over them, and blobs from outside that are being put together."""

    def __init__(self, blobs: FileBlobStore, models: FileModelStore) -> None:
        self.blobs = blobs
        self.models = models
        self.staging = Staging(blobs)


@asynccontextmanager
async def open_store(models: Path, state: Path, run_sync: RunSync, disk: Disk | None = None) -> AsyncIterator[Store]:
    """Open the store, making its folders. What a crash left is swept first. Raises ConfigError if a folder cannot be used.

    Leaving the block syncs and closes every partial. ``disk`` is for tests of faults.
    """
    disk = disk or Disk()
    try:
        layout = await run_sync(lambda: Layout(models, state))
    except OSError as error:
        raise ConfigError(
            f"the folder {error.filename or models} cannot be used for models: {error.strerror}"
        ) from None
    blobs = FileBlobStore(layout, disk, run_sync)
    with translated("the store was not opened"):
        await run_sync(layout.sweep)
        await run_sync(blobs.load_partials)
    store = Store(blobs, FileModelStore(blobs))
    await run_sync(lambda: store.staging.sweep(time.time()))
    async with trio.open_nursery() as nursery:
        blobs.start(nursery)
        try:
            yield store
        finally:
            await blobs.aclose()
            nursery.cancel_scope.cancel()
