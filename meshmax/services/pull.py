"""Pulls of models to here: which run, who watches them, how they ended. Satisfies ports.Pulls.

A model that is pulled twice at once is transferred once, under both names; when the last watcher leaves, the transfer is
cancelled and what was fetched is kept. Not here: the steps of a pull (services.pull_job).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio

from meshmax.base.errors import Busy, ModelNotFound, NoProviders
from meshmax.base.events import BlobProgress, Transfer
from meshmax.base.ids import Sha256
from meshmax.base.model import StoredModel
from meshmax.base.names import parse_name, split_digest
from meshmax.core.backoff import Random
from meshmax.ports import Catalog, Presence, RunSync, Swarm
from meshmax.services.model_exchange import FetchedModel
from meshmax.services.pull_job import Job, Store, World
from meshmax.services.pull_progress import Board
from meshmax.telemetry.isolate import isolate

MAX_PULLS: Final = 32  # at once; each may hold 64 MiB of chunks that wait for the disk
MAX_WATCHERS: Final = 64  # of one pull; each is somebody's open request
MAX_ENDED: Final = 100  # ended transfers that are remembered


class PartialModel(msgspec.Struct, frozen=True):
    """A model that is being pulled. ``names`` are full names, ``size`` bytes, ``fraction`` of them here, 0 to 1."""

    digest: Sha256
    names: tuple[str, ...]
    size: int
    fraction: float


class PullService:
    """Made by `open_pulls`."""

    def __init__(self, world: World, catalog: Catalog, nursery: trio.Nursery) -> None:
        self._world = world
        self._catalog = catalog
        self._nursery = nursery
        self._jobs: dict[Sha256, Job] = {}
        self._ended: deque[Transfer] = deque(maxlen=MAX_ENDED)
        self._count = 0

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        """See ports.Pulls. Busy beyond MAX_PULLS."""
        await trio.lowlevel.checkpoint()
        parsed = parse_name(split_digest(name)[0])
        try:
            resolved = self._catalog.resolve(name)
        except ModelNotFound:
            raise _nobody_has(name) from None
        if resolved.stored:
            with Board(_already_here(resolved.stored)).watch() as values:
                yield values
            return
        job = self._jobs.get(resolved.digest)
        if job is None:
            if not self._world.sources(resolved.digest):
                raise _nobody_has(name)
            job = self._start(Job(self._world, self._new_id(resolved.digest), resolved.digest, parsed))
        if job.watchers >= MAX_WATCHERS:
            raise Busy(f"{MAX_WATCHERS} requests wait for this model already")
        job.names.setdefault(parsed.key, parsed)
        job.watchers += 1
        try:
            with job.board.watch() as values:
                yield values
        finally:
            job.watchers -= 1
            if not job.watchers and self._jobs.get(job.digest) is job:
                del self._jobs[
                    job.digest
                ]  # who comes now begins anew, and waits until this one has let go of its files
                job.scope.cancel()

    def transfers(self) -> tuple[Transfer, ...]:
        """Running ones and the last MAX_ENDED ended ones, newest first."""
        running = [job.board.value for job in self._jobs.values()]
        return (*reversed(running), *self._ended)

    def partials(self) -> tuple[PartialModel, ...]:
        """The models that are being pulled and whose size is known: we serve what we have of them."""
        return tuple(
            PartialModel(
                job.digest, tuple(name.full for name in job.names.values()), job.board.value.bytes_total, job.fraction
            )
            for job in self._jobs.values()
            if job.board.value.bytes_total
        )

    def pulling(self, digest: Sha256) -> FetchedModel | None:
        """The manifest and record of a model that is being pulled, for those who pull it from us."""
        job = self._jobs.get(digest)
        return job.model if job else None

    def _start(self, job: Job) -> Job:
        if len(self._jobs) >= MAX_PULLS:
            raise Busy(f"{MAX_PULLS} models are being pulled already; try again when one is here")
        self._jobs[job.digest] = job
        self._nursery.start_soon(self._run, job)
        return job

    async def _run(self, job: Job) -> None:
        try:
            if not await isolate("pull", job.run, model=job.board.value.model):
                job.fail("the pull failed unexpectedly; the log says more")
        finally:
            if self._jobs.get(job.digest) is job:
                del self._jobs[job.digest]
            self._ended.appendleft(job.board.value)

    def _new_id(self, digest: Sha256) -> str:
        self._count += 1
        return f"{digest[:12]}-{self._count}"


@asynccontextmanager
async def open_pulls(
    swarm: Swarm,
    store: Store,
    catalog: Catalog,
    presence: Presence,
    *,
    random: Random,
    run_sync: RunSync,
    on_stored: Callable[[StoredModel], Awaitable[None]],
) -> AsyncIterator[PullService]:
    """Pulls from the peers of ``swarm`` into ``store``; leaving the block cancels those that run, partials are kept.

    ``on_stored`` is told of each name that was pulled, before its watchers are.
    """
    async with trio.open_nursery() as nursery:
        world = World(swarm, store.blobs, store.models, presence, random, run_sync, on_stored, {})
        yield PullService(world, catalog, nursery)
        nursery.cancel_scope.cancel()


def _nobody_has(name: str) -> NoProviders:
    # Ollama's words first, since programs look for them.
    return NoProviders(f"pull model manifest: file does not exist: no peer that can be reached has '{name[:200]}'")


def _already_here(stored: StoredModel) -> Transfer:
    blobs = tuple(BlobProgress(blob.digest, blob.size, blob.size) for blob in stored.manifest.blobs)
    size = sum(blob.size for blob in blobs)
    digest = stored.manifest.digest
    return Transfer(
        f"{digest[:12]}-0",
        stored.name,
        "in",
        "done",
        phase="success",
        bytes_total=size,
        bytes_done=size,
        blobs=blobs,
    )
