"""Fsck: every chunk of every blob here is read and checked, what is damaged is fetched again from the mesh, all is told.

Rules: one blob at a time, at the speed of the disk; nothing that is good is touched. A blob with bad chunks becomes a partial
without them, so that a repair fetches those alone. A model is repaired by pulling the very digest that its name meant; where
no peer has that, it stays as it is and is told of. What was deleted while others were read is passed over. Not here: checking
a blob (store), pulling (services.pull).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, Literal

import msgspec
import trio

from meshmax.base.catalog import Listed
from meshmax.base.errors import BlobNotFound, MeshmaxError, StoreError
from meshmax.base.events import Transfer
from meshmax.base.ids import Sha256
from meshmax.ports import BlobStore, Pulls

REPAIR_WAIT_S: Final = 10.0  # for somebody who has what is missing; who runs fsck looks at it


class Checked(msgspec.Struct, frozen=True):
    """A blob was read through. ``bad``: chunks that were damaged or not there, of ``count``."""

    digest: Sha256
    size: int
    bad: int
    count: int


class Verdict(msgspec.Struct, frozen=True):
    """How a model stands at the end; ``reason`` where it is damaged still."""

    model: str
    state: Literal["good", "repaired", "damaged"]
    reason: str = ""


class Fsck:
    """Checks one store. ``listing`` gives every name whose manifest can be read, usable or not."""

    def __init__(
        self,
        listing: Callable[[], Awaitable[Sequence[Listed]]],
        blobs: BlobStore,
        refresh: Callable[[], Awaitable[None]],
        pulls: Callable[[], Pulls],
    ) -> None:
        self._listing, self._blobs, self._refresh, self._pulls = listing, blobs, refresh, pulls

    async def run(self, repair: bool) -> AsyncGenerator[Checked | Verdict, None]:
        """Check everything, then repair where ``repair``; yields each blob and each model as it is known."""
        listed = await self._listing()
        sizes = {digest: size for model in listed for digest, size in model.blobs}
        damaged: dict[Sha256, str] = {}
        for digest, size in sizes.items():
            checked, reason = await self._check(digest, size)
            if reason:
                if all(digest != blob for model in await self._listing() for blob, _ in model.blobs):
                    continue
                damaged[digest] = reason
            yield checked
        if damaged:
            await self._refresh()
        for model in listed:
            # Anew for each: others were read, or fetched, since.
            if any((each.name, each.digest) == (model.name, model.digest) for each in await self._listing()):
                yield await self._judge(model, damaged, repair)

    async def _check(self, digest: Sha256, size: int) -> tuple[Checked, str]:
        try:
            haves = await self._blobs.verify(digest)
        except (BlobNotFound, StoreError) as error:
            return Checked(digest, size, 1, 1), error.message
        bad = haves.count - haves.total
        return Checked(digest, size, bad, haves.count), f"{bad} of {haves.count} chunks are damaged" if bad else ""

    async def _judge(self, model: Listed, damaged: dict[Sha256, str], repair: bool) -> Verdict:
        reason = model.problem or next((damaged[digest] for digest, _ in model.blobs if digest in damaged), "")
        if not reason:
            return Verdict(str(model.name), "good")
        if not repair:
            return Verdict(str(model.name), "damaged", reason)
        try:
            failure = await self._pull(f"{model.name}@{model.digest}")
        except MeshmaxError as error:
            failure = error.message
        if failure:
            return Verdict(str(model.name), "damaged", f"{reason}; and not repaired: {failure}")
        return Verdict(str(model.name), "repaired", reason)

    async def _pull(self, name: str) -> str:
        """Why it did not end well, or ''."""
        last: Transfer | None = None
        with trio.CancelScope() as patience:
            async with self._pulls().open_pull(name) as transfers:
                async for transfer in transfers:
                    if transfer.state == "paused":  # by a person, who alone lets it go on
                        return transfer.reason
                    if transfer.state != "waiting":
                        patience.deadline = math.inf
                    elif last is None or last.state != "waiting":
                        patience.deadline = trio.current_time() + REPAIR_WAIT_S
                    last = transfer
        if last is None:
            return "nobody answered"
        return "" if last.state == "done" else last.reason or last.state
