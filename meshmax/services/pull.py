"""Transfers of models: which pulls run, who watches them, which ones are detached, how they ended. Satisfies ports.Pulls.

Rules: a model that is pulled twice at once is transferred once, under both names. A pull that is watched is cancelled when
its last watcher leaves, and what was fetched is kept; a detached one goes on, is remembered (services.kept_downloads) and
taken up again by the next run of this node. What a peer asks us to pull is a detached pull, or one watched for it for as long
as it waits, if we take such requests; few at once. Not here: one pull (services.pull_job), what we send (services.outflow,
whose transfers are listed too).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Final, Literal

import msgspec
import trio

from meshmax.base.errors import (
    Busy,
    InvalidName,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    NotFound,
    Refused,
)
from meshmax.base.events import BlobProgress, Download, Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import StoredModel
from meshmax.base.names import ModelName, parse_name, split_digest
from meshmax.core.backoff import Random
from meshmax.core.catalog import AnotherThere
from meshmax.ports import Catalog, Naming, Presence, RunSync, Swarm, Throttle
from meshmax.services.kept_downloads import Keep, KeptDownloads, forget, remembered_model
from meshmax.services.lane_client import LaneOpener
from meshmax.services.lane_spares import LaneSpares
from meshmax.services.model_exchange import FetchedModel
from meshmax.services.outflow import Outflow
from meshmax.services.pull_job import Job
from meshmax.services.pull_progress import FINAL, Board
from meshmax.services.pull_world import LocalSources, Room, Seek, Store, World, seek_nowhere
from meshmax.services.upstream_pull import UpstreamPull, UpstreamPulls
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

MAX_PULLS: Final = 32  # at once; each may hold 64 MiB of chunks that wait for the disk
MAX_ASKED: Final = 4  # of those, begun because a peer asked for it
MAX_WATCHERS: Final = 64  # of one pull; each is somebody's open request
MAX_ENDED: Final = 100  # ended transfers that are remembered
CANCEL_WAIT_S: Final = 15.0  # for a cancelled pull to let go of its files

Action = Literal["cancel", "pause", "resume"]

_log = get_logger("pull")


class PartialModel(msgspec.Struct, frozen=True):
    """A model that is being pulled. ``names`` are full names, ``size`` bytes, ``fraction`` of them here, 0 to 1."""

    digest: Sha256
    names: tuple[str, ...]
    size: int
    fraction: float


class PullService:
    """Made by `open_pulls`."""

    def __init__(
        self,
        world: World,
        catalog: Catalog,
        nursery: trio.Nursery,
        outflow: Outflow,
        on_change: Callable[[], None],
        keep: Keep,
        accept: bool,
    ) -> None:
        self._world = world
        self._catalog = catalog
        self._nursery = nursery
        self._outflow = outflow
        self._on_change = on_change
        self._kept = KeptDownloads(keep, self._downloads)
        self._accept = accept
        self._jobs: dict[Sha256, Job] = {}
        self._ended: deque[Transfer] = deque(maxlen=MAX_ENDED)
        self._count = 0
        self._closed = False

    # --- ports.Pulls -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        """See ports.Pulls. Busy beyond MAX_PULLS."""
        await trio.lowlevel.checkpoint()
        with self._watched(await self._find_anywhere(name)) as values:
            yield values

    @contextmanager  # no checkpoint between a pull's beginning and its first watcher, without whom it would go on for ever
    def _watched(self, found: Job | StoredModel) -> Iterator[AsyncIterator[Transfer]]:
        if isinstance(found, StoredModel):
            with Board(_already_here(found)).watch() as values:
                yield values
            return
        job = found
        if job.watchers >= MAX_WATCHERS:
            raise Busy(f"{MAX_WATCHERS} requests wait for this model already")
        job.watchers += 1
        try:
            with job.board.watch() as values:
                yield values
        finally:
            job.watchers -= 1
            if not job.watchers and not job.detached and self._under_way(job.digest) is job:
                # Who comes now begins anew, and waits until this one has let go of its files.
                del self._jobs[job.digest]
                job.cancel(asked=False)

    async def start_download(self, name: str) -> Transfer:
        """See ports.Pulls. Busy beyond MAX_PULLS."""
        return await self._in_background(await self._find_anywhere(name, detached=True))

    def transfers(self) -> tuple[Transfer, ...]:
        """Running ones and the last MAX_ENDED ended ones, newest first; then what is sent, likewise."""
        running = [job.board.value for job in self._jobs.values()]
        return (*reversed(running), *self._ended, *self._outflow.transfers())

    async def steer(self, transfer_id: str, action: Action) -> Transfer:
        """See ports.Pulls."""
        job = self._job(transfer_id)
        if job is None:
            await trio.lowlevel.checkpoint()
            raise self._not_steered(transfer_id)
        if action == "cancel":
            job.cancel(asked=True)
            with trio.move_on_after(CANCEL_WAIT_S):
                await job.ended.wait()
        elif action == "pause":
            job.pause()
        else:
            job.resume()
        if job.detached:
            await self._kept.remember()
        return job.board.value

    def _job(self, wanted: str) -> Job | None:
        """The pull with this id, or of the model with this name where there is one."""
        for job in self._jobs.values():
            if job.board.value.id == wanted:
                return job
        try:
            key = parse_name(split_digest(wanted)[0]).key
        except InvalidName:
            return None
        named = [job for job in self._jobs.values() if key in job.names]
        return named[0] if len(named) == 1 else None

    def _not_steered(self, transfer_id: str) -> MeshmaxError:
        for transfer in self.transfers():
            if transfer.id == transfer_id and transfer.direction == "out":
                return InvalidRequest("what is sent to a peer is steered by that peer, which fetches it")
            if transfer.id == transfer_id:
                return InvalidRequest(f"the transfer has ended already ({transfer.state})")
        return NotFound(f"no transfer '{transfer_id[:100]}' is known here: `meshmax transfers` lists those that are")

    # --- for meshmax.node and other services ------------------------------------------------------------------------------

    def partials(self) -> tuple[PartialModel, ...]:
        """The models that are being pulled and whose size is known: we serve what we have of them. What comes from a
        registry is none of them, since nobody can vouch for its chunks before its end."""
        return tuple(
            PartialModel(
                job.digest, tuple(name.full for name in job.names.values()), job.board.value.bytes_total, job.fraction
            )
            for job in self._jobs.values()
            if job.model and job.board.value.bytes_total and job.board.value.state not in FINAL
        )

    def needed(self) -> frozenset[Sha256]:
        """The blobs of every pull that has not ended, waiting and paused ones too."""
        return frozenset(layer.digest for job in self._jobs.values() for layer in job.blobs)

    def held(self, digest: Sha256) -> AbstractAsyncContextManager[None]:
        """Alone with a blob: no pull fetches or completes it meanwhile."""
        return self._world.held(digest)

    def pulling(self, digest: Sha256) -> FetchedModel | None:
        """The manifest and record of a model that is being pulled, for those who pull it from us."""
        job = self._jobs.get(digest)
        return job.model if job else None

    async def accept(self, peer: PeerId, name: str, digest: Sha256) -> str:
        """A peer asks us to pull a model: the transfer's id. Raises Refused, Busy, NoProviders, InvalidName."""
        return (await self._in_background(self._asked_for(peer, name, digest, detached=True))).id

    @asynccontextmanager
    async def open_asked(self, peer: PeerId, name: str, digest: Sha256) -> AsyncIterator[AsyncIterator[Transfer]]:
        """A peer waits for us to pull a model: as `open_pull`, for as long as the block is open. Raises as `accept`."""
        await trio.lowlevel.checkpoint()
        with self._watched(self._asked_for(peer, name, digest, detached=False)) as values:
            yield values

    def _asked_for(self, peer: PeerId, name: str, digest: Sha256, *, detached: bool) -> Job | StoredModel:
        if not self._accept:
            raise Refused("this peer pulls nothing that others ask for (accept_distribute is off in its configuration)")
        resolved = self._resolve(name)
        if resolved is None:
            raise _nobody_has(name, self._hint(name))
        if resolved.digest != digest:
            raise Refused(f"'{name[:200]}' means another model on this peer ({resolved.digest[:12]})")
        asked = sum(bool(job.asked_by) for job in self._jobs.values())
        if digest not in self._jobs and resolved.stored is None and asked >= MAX_ASKED:
            raise Busy(f"this peer pulls {asked} models already that others asked for", 30.0)
        _log.info("asked to pull", peer=peer, model=name, detached=detached)
        return self._find(name, detached=detached, asked_by=peer)

    def take_up(self, downloads: Sequence[Download]) -> None:
        """Go on with what an earlier run remembered. What cannot be read any more is dropped, with a word in the log."""
        self._kept.kept = tuple(downloads)
        for download in downloads[:MAX_PULLS]:
            try:
                names = [parse_name(name) for name in download.names]
                model = remembered_model(download)
            except MeshmaxError as error:
                _log.warning("a remembered download is not valid", model=download.names, error=error.message)
                continue
            tail = download.id.rpartition("-")[2]
            self._count = max(self._count, int(tail) if tail.isdecimal() else 0)
            self._start(
                Job(
                    self._world,
                    download.id,
                    download.digest,
                    {name.key: name for name in names},
                    detached=True,
                    asked_by=download.asked_by,
                    paused=download.paused,
                    model=model,
                    on_change=self._changed,
                )
            )

    def close(self) -> None:
        """Begin no pull any more: peers' streams outlive the nursery that pulls run in by a moment."""
        self._closed = True

    async def run_keeper(self) -> None:
        """Remember the detached pulls whenever they changed, until cancelled."""
        await self._kept.run()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _find(self, name: str, *, detached: bool = False, asked_by: str = "") -> Job | StoredModel:
        """The model if it is here, else its pull, begun if there is none. Raises NoProviders, Busy, InvalidName."""
        parsed = parse_name(split_digest(name)[0])
        resolved = self._resolve(name)
        if resolved is None:
            raise _nobody_has(name, self._hint(name))
        if resolved.stored:
            return resolved.stored
        if self._under_way(resolved.digest) is None and not self._world.sources(resolved.digest):
            raise _only_runs(name, resolved.server) if resolved.server else _nobody_has(name)
        return self._join(resolved.digest, parsed, detached, asked_by)

    async def _find_anywhere(self, name: str, *, detached: bool = False) -> Job | StoredModel:
        """As `_find`; what no neighbour has is looked for farther away, then at registries."""
        if not self._is_near(name):
            await self._world.seek(name, lambda: self._is_near(name))
        try:
            return self._find(name, detached=detached)
        except NoProviders as error:
            if self._world.upstream is None:
                raise
            nobody = error
        parsed, resolved = parse_name(split_digest(name)[0]), self._resolve(name)
        try:
            origin = await self._world.upstream.find(name, parsed, resolved.digest if resolved else None)
        except NoProviders as error:
            raise NoProviders(f"{nobody.message}; upstream: {error.message}") from None
        return self._join(origin.manifest.digest, parsed, detached, origin=origin)

    def _is_near(self, name: str) -> bool:
        """Whether it is here, on its way here, or at a neighbour. Raises InvalidName."""
        resolved = self._resolve(name)
        if resolved is None:
            return False
        known = resolved.stored or self._under_way(resolved.digest) or self._world.sources(resolved.digest)
        return bool(known)

    def _join(
        self, digest: Sha256, name: ModelName, detached: bool, asked_by: str = "", origin: UpstreamPull | None = None
    ) -> Job:
        """The pull of ``digest``, begun if there is none, also under ``name``. Raises InvalidRequest (a pinned name)."""
        self._world.guard(name, digest)
        job = self._under_way(digest) or self._start(
            Job(
                self._world,
                self._new_id(digest),
                digest,
                {name.key: name},
                detached=detached,
                asked_by=asked_by,
                origin=origin,
                on_change=self._changed,
            )
        )
        job.names.setdefault(name.key, name)
        return job

    def _under_way(self, digest: Sha256) -> Job | None:
        job = self._jobs.get(digest)
        return job if job and not job.cancelled and job.board.value.state not in FINAL else None

    def _resolve(self, name: str) -> _Meaning | None:
        """What ``name`` means, by the catalog or by a pull that is under way. Raises InvalidName."""
        try:
            resolved = self._catalog.resolve(name, parts=True)
        except ModelNotFound:
            text, digest = split_digest(name)
            key = parse_name(text).key
            for job in self._jobs.values():
                if key in job.names and job.digest.startswith(digest or ""):
                    return _Meaning(job.digest, None)
            return None
        server = next((self._world.peer_name(peer) for peer in resolved.entry.servers), "")
        return _Meaning(resolved.digest, resolved.stored, server)

    def _hint(self, name: str) -> str:
        """How to choose the other model that is there under ``name``, '' where there is none. Raises InvalidName."""
        try:
            self._catalog.resolve(name, parts=True)
        except AnotherThere as error:
            return error.hint
        except ModelNotFound:
            pass
        return ""

    async def _in_background(self, found: Job | StoredModel) -> Transfer:
        if isinstance(found, StoredModel):
            await trio.lowlevel.checkpoint()
            here = _already_here(found)
            if all(transfer.id != here.id for transfer in self._ended):
                self._ended.appendleft(here)
            return here
        found.detach()
        await self._kept.remember()
        return found.board.value

    def _start(self, job: Job) -> Job:
        if self._closed:
            raise Busy("this peer is shutting down")
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
            job.ended.set()
            self._changed()

    def _changed(self) -> None:
        self._kept.changed()
        self._on_change()

    def _downloads(self) -> tuple[Download, ...]:
        return tuple(job.download() for job in self._jobs.values() if job.detached)

    def _new_id(self, digest: Sha256) -> str:
        self._count += 1
        return f"{digest[:12]}-{self._count}"


class _Meaning(msgspec.Struct, frozen=True):
    """What a name means: a digest, and our own copy if there is one. ``server``: whose engine brings it along, by name."""

    digest: Sha256
    stored: StoredModel | None
    server: str = ""


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
    on_change: Callable[[], None] = lambda: None,
    outflow: Outflow | None = None,
    downloads: Sequence[Download] = (),
    keep: Keep = forget,
    accept: bool = True,
    upstream: UpstreamPulls | None = None,
    opener: LaneOpener | None = None,
    throttle: Throttle | None = None,
    naming: Naming | None = None,
    local: LocalSources = lambda digest: (),
    room: Room = lambda layers: nullcontext(),
    guard: Callable[[ModelName, Sha256], None] = lambda name, digest: None,
    seek: Seek = seek_nowhere,
) -> AsyncIterator[PullService]:
    """Pulls from the peers of ``swarm`` into ``store``; leaving the block cancels those that run, partials are kept.

    ``on_stored`` is told of each name that was pulled, before its watchers are; ``on_change``: a pull's model became known,
    or it was paused, resumed or has ended. ``downloads``: what an earlier run's ``keep`` was given. ``accept``: whether
    we pull what peers ask us to. ``upstream``: registries that are asked for what no peer has.
    ``opener`` None: no lanes; ``local``: sources of a blob on this machine; ``naming`` None: the store itself.
    ``seek`` looks for providers that are no neighbours.
    """
    outflow = outflow or Outflow()
    async with trio.open_nursery() as nursery:
        world = World(
            swarm,
            store.blobs,
            naming or store.models,
            presence,
            random,
            run_sync,
            on_stored,
            upstream=upstream,
            opener=LaneSpares(opener, nursery) if opener else None,
            throttle=throttle,
            local=local,
            room=room,
            guard=guard,
            seek=seek,
        )
        pulls = PullService(world, catalog, nursery, outflow, on_change, keep, accept)
        pulls.take_up(downloads)
        nursery.start_soon(pulls.run_keeper)
        nursery.start_soon(outflow.run)
        try:
            yield pulls
        finally:
            pulls.close()
            nursery.cancel_scope.cancel()


def _nobody_has(name: str, hint: str = "") -> NoProviders:
    """``hint``: what else there is under the name."""
    # Ollama's words first, since programs look for them.
    why = f" as it was first seen; {hint}" if hint else ""
    return NoProviders(f"pull model manifest: file does not exist: no peer that can be reached has '{name[:200]}'{why}")


def _only_runs(name: str, server: str) -> NoProviders:
    return NoProviders(
        f"pull model manifest: file does not exist: '{name[:200]}' runs at {server}, whose engine brings it along and gives"
        " no files: use it from there, or have that peer take the files in (`meshmax add --from-ollama` there)"
    )


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
