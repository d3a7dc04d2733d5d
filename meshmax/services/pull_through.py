"""Pulls that go on while somebody reads from them: the reading side of a registry that has not everything yet.

Rules: whoever reads a blob of a model that is not here holds the model's pull; holders of one model share one pull; it
ends LINGER_S after the last holder has let go, since a registry's clients come back with the next range. Chunks are read
from the store as they arrive, verified there; a slow reader holds nothing up but itself. A pull that fails fails its
readers, and the next holder begins anew. Not here: how models are pulled (services.pull), HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from meshmax.base.errors import BlobNotFound, MeshmaxError, StoreCorrupt, error_for
from meshmax.base.ids import Sha256
from meshmax.ports import BlobStore, Pulls
from meshmax.telemetry.isolate import isolate

LINGER_S: Final = 10.0  # clients pause between ranges, and wait 1, 2, 4 s after a failure
POLL_S: Final = 0.05  # how soon a reader sees that its chunk has come


class Hold:
    """A pull that is being read from. ``failure`` says why it ended, if it failed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = 0
        self.left_s = 0.0  # when the last one let go
        self.failure: MeshmaxError | None = None
        self.over = False
        self.scope = trio.CancelScope()


class PullThrough:
    """Made by `open_pull_through`."""

    def __init__(self, pulls: Pulls, blobs: BlobStore, nursery: trio.Nursery) -> None:
        self._pulls = pulls
        self._blobs = blobs
        self._nursery = nursery
        self._holds: dict[Sha256, Hold] = {}  # by model; bounded by the pulls that may run at once

    @contextmanager
    def hold(self, model: Sha256, name: str) -> Iterator[Hold]:
        """Have the model ``model`` pulled as ``name`` while inside, or join the pull that runs."""
        hold = self._holds.get(model)
        if hold is None:
            hold = self._holds[model] = Hold(f"{name}@{model}")
            self._nursery.start_soon(self._run, model, hold)
        hold.readers += 1
        try:
            yield hold
        finally:
            hold.readers -= 1
            if not hold.readers:
                hold.left_s = trio.current_time()
                self._nursery.start_soon(self._linger, model, hold)

    async def read_chunk(self, hold: Hold, digest: Sha256, index: int) -> bytes:
        """A chunk of a blob of the model, when it is here. Raises what the pull failed with, BlobNotFound."""
        while True:
            over = hold.over  # before the look, so that what came last is seen
            try:
                return await self._blobs.read_chunk(digest, index)
            except (BlobNotFound, StoreCorrupt) as error:
                if over:
                    raise hold.failure or error from None
            await trio.sleep(POLL_S)

    async def _run(self, model: Sha256, hold: Hold) -> None:
        ended_well = False
        with hold.scope:
            ended_well = await isolate("pull through", lambda: self._watch(hold), model=hold.name[:200])
        hold.over = True
        if not ended_well and hold.failure is None:
            hold.failure = BlobNotFound("the pull ended before the blob was here")
        self._let_go(model, hold)

    async def _watch(self, hold: Hold) -> None:
        try:
            async with self._pulls.open_pull(hold.name) as transfers:
                async for transfer in transfers:
                    if transfer.state in ("failed", "cancelled"):
                        reason = transfer.reason or f"the pull was {transfer.state}"
                        hold.failure = error_for(transfer.error_code, reason)
        except MeshmaxError as error:
            hold.failure = error

    async def _linger(self, model: Sha256, hold: Hold) -> None:
        await trio.sleep(LINGER_S)
        if not hold.readers and trio.current_time() - hold.left_s >= LINGER_S:
            self._let_go(model, hold)  # at once: who comes while it ends begins anew
            hold.scope.cancel()

    def _let_go(self, model: Sha256, hold: Hold) -> None:
        if self._holds.get(model) is hold:
            del self._holds[model]


@asynccontextmanager
async def open_pull_through(pulls: Pulls, blobs: BlobStore) -> AsyncIterator[PullThrough]:
    """Pulls for readers; leaving the block ends them."""
    async with trio.open_nursery() as nursery:
        yield PullThrough(pulls, blobs, nursery)
        nursery.cancel_scope.cancel()
