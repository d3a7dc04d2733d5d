"""Pulls that ended before their model was whole, or halt: which models the partials here belong to, how a person frees them.

A partial knows its blob alone; the names are remembered here as pulls go by, over restarts too, until the model is whole
or its partials are gone. Not here: pulls (services.pull), partials that nobody came back for (services.sweep).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Protocol

import msgspec
import trio

from meshmax.base.events import Transfer
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name, split_digest
from meshmax.ports import Pulls, RunSync
from meshmax.store import Store
from meshmax.store.home import Home
from meshmax.store.leftovers_file import load_leftovers, save_leftovers
from meshmax.store.usage import read_usage
from meshmax.telemetry.isolate import isolate

MAX_NAMES: Final = 256  # remembered; the oldest is forgotten first
LET_GO_S: Final = 10.0  # for a cancelled pull to let go of its files, which it syncs first
LOOK_S: Final = 0.1
MAX_BLOBS: Final = 64  # of one model that are remembered; models have under 10

Begun = Mapping[str, Mapping[Sha256, int]]  # name -> its blobs' digests and sizes
_ENDED: Final = frozenset({"done", "failed", "cancelled"})
_HALTED: Final = frozenset({"paused", "waiting"})


class Leftover(msgspec.Struct, frozen=True):
    """What is here of a model of which nothing moves now: ``here_bytes`` of ``size_bytes``.

    ``transfer``: the id of its pull, which is paused or waits (``state``); '' where there is none.
    """

    name: str
    here_bytes: int
    size_bytes: int
    transfer: str = ""
    state: str = ""


class Leftovers:
    """``here``: bytes that were fetched of each partial. ``drop``: delete one that is at rest; whether there was one."""

    def __init__(
        self,
        transfers: Callable[[], tuple[Transfer, ...]],
        here: Callable[[], Awaitable[Mapping[Sha256, int]]],
        drop: Callable[[Sha256, int], Awaitable[bool]],
        save: Callable[[Begun], Awaitable[None]],
        known: Begun,
    ) -> None:
        self._transfers, self._here, self._drop, self._save = transfers, here, drop, save
        self._begun: dict[str, dict[Sha256, int]] = {name: dict(blobs) for name, blobs in known.items()}
        self._dropped = False
        # Ids of the pulls whose partials a person freed, as long as those are told of.
        self._freed: frozenset[str] = frozenset()
        self._woken = trio.Event()

    def wake(self) -> None:
        """A pull's model became known, or it ended: note it soon."""
        self._woken.set()

    def before(self, on_change: Callable[[], None]) -> Callable[[], None]:
        """Both: `wake`, and ``on_change``."""

        def both() -> None:
            self.wake()
            on_change()

        return both

    def note(self) -> bool:
        """Remember the pulls that there are; whether that is news."""
        before = dict(self._begun)
        for transfer in reversed(self._transfers()):  # the oldest first, so that a name's newest pull decides
            if transfer.direction != "in" or not transfer.blobs:
                continue
            name = _name_of(transfer)
            self._begun.pop(name, None)
            if transfer.state != "done":
                self._begun[name] = {blob.digest: blob.size for blob in transfer.blobs[:MAX_BLOBS]}
        while len(self._begun) > MAX_NAMES:
            del self._begun[next(iter(self._begun))]
        return self._begun != before

    async def list(self) -> tuple[Leftover, ...]:
        """Those of which something is here."""
        here, going, pulls = await self._here(), self._going(), self._pulls()
        found = []
        for name, blobs in self._begun.items():
            size, pull = sum(here.get(digest, 0) for digest in blobs), pulls.get(name)
            if size and pull is not None and pull.state in _HALTED:
                found.append(Leftover(name, size, sum(blobs.values()), pull.id, pull.state))
            elif size and not going & blobs.keys():
                found.append(Leftover(name, size, sum(blobs.values())))
        return tuple(found)

    def _pulls(self) -> dict[str, Transfer]:
        """The newest pull of each name."""
        pulls = (transfer for transfer in reversed(self._transfers()) if transfer.direction == "in")
        return {_name_of(transfer): transfer for transfer in pulls}

    async def drop(self, name: str) -> bool:
        """Delete what is here of the model ``name``, but for what a pull needs now; whether there was something.

        Raises InvalidName, StoreError.
        """
        key = parse_name(name).key
        left: set[Sha256] = set()
        dropped, going = False, self._going()
        for known in [known for known in self._begun if parse_name(known).key == key]:
            blobs = self._begun[known]
            if going & blobs.keys():
                continue
            with trio.move_on_after(LET_GO_S):
                while left := blobs.keys() & (await self._here()).keys():
                    for digest in left:
                        dropped |= await self._drop(digest, blobs[digest])
                    await trio.sleep(LOOK_S)  # a pull that was just cancelled still closes its files
            if not left:
                self._begun.pop(known, None)
                self._free(known)
                self._dropped = True
                self.wake()
        return dropped

    def freed(self, transfer: str) -> bool:
        """Whether nothing is here any more of what the pull with this id fetched, since a person freed it."""
        return transfer in self._freed

    def _free(self, name: str) -> None:
        known = {transfer.id for transfer in self._transfers()}
        pull = self._pulls().get(name)
        self._freed = (self._freed & known) | ({pull.id} if pull else set())

    async def run_keeper(self) -> None:
        """Save what is remembered whenever that changed, until cancelled."""
        while True:
            await self._woken.wait()
            self._woken = trio.Event()
            if self.note() or self._dropped:
                self._dropped = False
                begun = {name: dict(blobs) for name, blobs in self._begun.items()}
                await isolate("leftovers", partial(self._save, begun))

    def _going(self) -> frozenset[Sha256]:
        """The blobs that pulls need now."""
        running = (t for t in self._transfers() if t.direction == "in" and t.state not in _ENDED)
        return frozenset(blob.digest for transfer in running for blob in transfer.blobs)


def _name_of(transfer: Transfer) -> str:
    return str(parse_name(split_digest(transfer.model)[0]))


class HasPulls(Protocol):
    """A node, as far as its leftovers go; ``pulls`` are looked up late."""

    home: Home
    store: Store
    pulls: Pulls


def make_leftovers(node: HasPulls, run_sync: RunSync) -> Leftovers:
    """Those of one node. Blocks briefly."""
    home, store = node.home.path, node.store

    async def here() -> Mapping[Sha256, int]:
        usage = await run_sync(partial(read_usage, store.blobs.layout))
        fetched = dict(usage.staged)
        for each in usage.partials:  # whose files are as large as their blobs from the beginning
            if known := await store.blobs.haves(each.digest):
                chunk_map, haves = known
                fetched[each.digest] = sum(chunk_map.span(at)[1] for at in range(chunk_map.count) if at in haves)
        return fetched

    async def drop(digest: Sha256, size: int) -> bool:
        dropped = await store.blobs.drop_partial(digest)
        if digest in (await run_sync(partial(read_usage, store.blobs.layout))).staged:
            staged = await store.staging.open_download(digest, size)
            await staged.discard()
            return True
        return dropped

    async def save(begun: Begun) -> None:
        await run_sync(partial(save_leftovers, home, begun))

    def transfers() -> tuple[Transfer, ...]:
        return node.pulls.transfers()

    return Leftovers(transfers, here, drop, save, load_leftovers(home))


@asynccontextmanager
async def open_leftovers(leftovers: Leftovers) -> AsyncIterator[Leftovers]:
    """Remember while inside."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leftovers.run_keeper)
        try:
            yield leftovers
        finally:
            nursery.cancel_scope.cancel()
