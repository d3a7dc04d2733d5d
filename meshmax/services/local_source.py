"""A source of chunks on this machine, such as a bundle on a stick: one more source of a blob beside its peers.

It is asked, struck and banned as a peer is, under a name of its own that no PeerId can have. One chunk is read at a time.
Not here: where the chunks come from (ports.ChunkSource), what to ask for (core.fetch).
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from meshmax.base.errors import BlobNotFound, MeshmaxError, StoreCorrupt
from meshmax.base.ids import PeerId
from meshmax.base.model import Haves
from meshmax.ports import ChunkSource
from meshmax.services.fetch_events import Gone, Lacking, Offered
from meshmax.services.landing import Landing

NAME_PREFIX: Final = "local:"


def name_of(source: ChunkSource) -> PeerId:
    """What a local source is called among the peers of a transfer."""
    return PeerId(NAME_PREFIX + source.name)


class LocalSession:
    """One local source of one blob; the counterpart of blob_client.Session."""

    lanes: Final = 0

    def __init__(self, source: ChunkSource, landing: Landing) -> None:
        self.peer = name_of(source)
        self.haves = Haves.none(landing.chunk_map.count)
        self._held = False
        self._source, self._landing = source, landing
        self._scope = trio.CancelScope()
        self._wanted: deque[int] = deque()  # bounded by the window
        self._wake = trio.Event()

    def alive(self) -> bool:
        """Whether it is at work."""
        return self._held

    def want(self, index: int) -> None:
        """Read a chunk."""
        self._wanted.append(index)
        self._wake.set()

    def withdraw(self, index: int) -> None:
        """A chunk is not wanted any more. It is read all the same: that is quick, and is its last word."""

    def flush(self) -> None:
        """Nothing to send."""

    def end(self) -> None:
        """Give the source up; its Gone follows."""
        self._scope.cancel()

    def offer_taken(self) -> Haves:
        """What the source has."""
        return self.haves

    async def run(self) -> None:
        """Until it fails or is given up."""
        failure: MeshmaxError | None = None
        with self._scope:
            try:
                haves = await self._source.haves(self._landing.chunk_map.sha256)
                if haves is not None and haves.count == self.haves.count:
                    self.haves = haves
                    self._landing.inbox.put(Offered(self.peer))
                    await self._read()
            except MeshmaxError as error:
                failure = error
        self._landing.inbox.put(Gone(self.peer, failure))

    async def _read(self) -> None:
        digest = self._landing.chunk_map.sha256
        while True:
            while not self._wanted:
                self._wake = trio.Event()
                await self._wake.wait()
            index = self._wanted.popleft()
            self._held = True  # a slow medium is not a silent one
            try:
                data = await self._source.read_chunk(digest, index)
            except (BlobNotFound, StoreCorrupt):
                self._landing.inbox.put(Lacking(self.peer, index))
            else:
                await self._landing.land(self.peer, index, data)
            finally:
                self._held = False
