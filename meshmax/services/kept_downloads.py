"""The pulls that go on over restarts: remembered whenever they changed, and read again by the next run.

A disk that does not take them costs those pulls their next run, and a word in the log. Not here: which pulls these are
(services.pull), the file (store.downloads).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from meshmax.base.events import Download
from meshmax.services.model_exchange import FetchedModel, check_record
from meshmax.telemetry.isolate import isolate
from meshmax.wire.manifest import parse_manifest

Keep = Callable[[tuple[Download, ...]], Awaitable[None]]


async def forget(_downloads: tuple[Download, ...]) -> None:
    """A Keep that keeps nothing."""
    await trio.lowlevel.checkpoint()


class KeptDownloads:
    """``keep`` is given what ``wanted`` tells, where that is not what it was given last (at first: ``kept``)."""

    def __init__(self, keep: Keep, wanted: Callable[[], tuple[Download, ...]]) -> None:
        self._keep, self._wanted = keep, wanted
        self._changes = trio.Event()
        self._keeping = trio.Lock()
        self.kept: tuple[Download, ...] = ()

    def changed(self) -> None:
        """There may be something to remember. Cheap."""
        self._changes.set()

    async def run(self) -> None:
        """Remember whatever changed, until cancelled."""
        while True:
            await self._changes.wait()
            self._changes = trio.Event()
            await self.remember()

    async def remember(self) -> None:
        """Remember what there is now."""
        async with self._keeping:
            downloads = self._wanted()
            if downloads != self.kept and await isolate("downloads", partial(self._keep, downloads)):
                self.kept = downloads


def remembered_model(download: Download) -> FetchedModel | None:
    """What a remembered download consists of, checked as if a peer had told it. Raises ManifestInvalid."""
    if not download.manifest:
        return None
    manifest = parse_manifest(download.manifest)
    if manifest.digest != download.digest:
        return None
    record = check_record(download.record, manifest) if download.record else None
    return FetchedModel(manifest, record, download.record)
