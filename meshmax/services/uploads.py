"""Blobs that are being pushed to this peer, and the manifests that make models of them.

Rules: an upload is bytes at places in a staged file; its digest comes last and decides. At most MAX_UPLOADS at once; one
that hears nothing for IDLE_S is thrown away, and a crash leaves none behind. A manifest is taken when every blob that it
names is whole here with its size; the model is then published under its name with a record of ours. Blobs that no
manifest has named KEPT_S after they came are removed. Not here: HTTP (api.registry_uploads), files (store.staging).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.errors import BlobNotFound, Busy, IntegrityError, MeshmaxError, NotFound
from meshmax.base.ids import Sha256
from meshmax.base.model import Manifest, StoredModel
from meshmax.base.names import ModelName
from meshmax.ports import BlobStore
from meshmax.services.registry_ports import BlobStaging, StagedBlob
from meshmax.telemetry.isolate import isolate
from meshmax.wire.manifest import parse_manifest

MAX_UPLOADS: Final = 32  # at once; a client pushes a few blobs side by side
IDLE_S: Final = 600.0
KEPT_S: Final = 3600.0  # as long as Ollama keeps a blob that nothing refers to
MAX_LOOSE: Final = 4096  # pushed blobs without a manifest; a model of tensors has that many
SWEEP_S: Final = 60.0

Publish = Callable[[ModelName, Manifest], Awaitable[StoredModel]]


class UploadUnknown(NotFound):
    """There is no such upload; it may have been idle for too long."""

    code = "upload_unknown"


class Upload:
    """One blob on its way in."""

    def __init__(self, upload_id: str, staged: StagedBlob, now: float) -> None:
        self.id = upload_id
        self.staged = staged
        self.used_s = now
        self.busy = trio.Lock()  # parts come one after the other

    @property
    def size(self) -> int:
        """Bytes that are here without a gap."""
        return self.staged.have.prefix


class Uploads:
    """Made by `open_uploads`."""

    def __init__(
        self,
        staging: BlobStaging,
        blobs: BlobStore,
        publish: Publish,
        local: Callable[[], tuple[StoredModel, ...]],
        remove: Callable[[Sha256], Awaitable[None]],
    ) -> None:
        self._staging = staging
        self._blobs = blobs
        self._publish = publish
        self._local = local
        self._remove = remove
        self._open: dict[str, Upload] = {}
        self._opening = 0
        self._loose: dict[Sha256, float] = {}  # pushed blobs -> when, until a manifest names them
        self._naming: Counter[Sha256] = Counter()  # blobs of manifests that are being taken: they stay
        self._removing = trio.Lock()

    async def open(self) -> Upload:
        """A new upload. Raises Busy, StoreError."""
        if len(self._open) + self._opening >= MAX_UPLOADS:
            raise Busy(f"{MAX_UPLOADS} blobs are being pushed to this peer already", 5.0)
        self._opening += 1
        try:
            staged = await self._staging.open_upload()
        finally:
            self._opening -= 1
        upload = Upload(secrets.token_hex(16), staged, trio.current_time())
        self._open[upload.id] = upload
        return upload

    def get(self, upload_id: str) -> Upload:
        """An upload under way. Raises UploadUnknown."""
        upload = self._open.get(upload_id)
        if upload is None:
            raise UploadUnknown
        upload.used_s = trio.current_time()
        return upload

    async def write(self, upload: Upload, offset: int, data: bytes) -> None:
        """Bytes of the blob. Raises StoreFull, StoreError."""
        await upload.staged.write(offset, data)
        await upload.staged.hash_on()
        upload.used_s = trio.current_time()

    async def finish(self, upload: Upload, digest: Sha256) -> None:
        """Every byte has come. Raises IntegrityError (the upload is gone then), StoreError (bytes are missing)."""
        if await self.has(digest):
            if digest in self._loose:  # whoever pushes it again is about to name it
                self._loose[digest] = trio.current_time()
            await self.cancel(upload)
            return
        async with upload.busy:
            try:
                await upload.staged.finish(digest)
            except IntegrityError:
                self._open.pop(upload.id, None)
                raise
        self._open.pop(upload.id, None)
        while len(self._loose) >= MAX_LOOSE:
            self._loose.pop(next(iter(self._loose)))
        self._loose[digest] = trio.current_time()

    async def cancel(self, upload: Upload) -> None:
        """Throw away what came."""
        self._open.pop(upload.id, None)
        await upload.staged.aclose()

    async def has(self, digest: Sha256) -> bool:
        """Whether the blob is whole here."""
        try:
            await self._blobs.path(digest)
        except MeshmaxError:
            return False
        return True

    async def put_manifest(self, name: ModelName, raw: bytes) -> StoredModel:
        """Make a model of blobs that are here. Raises ManifestInvalid, BlobNotFound that names the first one missing."""
        manifest = parse_manifest(raw)
        with self._named(manifest):
            async with self._removing:
                pass  # one that is being removed is gone by then
            for layer in manifest.blobs:
                if not await self.has(layer.digest):
                    raise BlobNotFound(f"blob sha256:{layer.digest} was not pushed")
            stored = await self._publish(name, manifest)
        for layer in manifest.blobs:
            self._loose.pop(layer.digest, None)
        return stored

    @contextmanager
    def _named(self, manifest: Manifest) -> Iterator[None]:
        """While inside, no sweep removes what ``manifest`` names."""
        digests = {layer.digest for layer in manifest.blobs}
        self._naming.update(digests)
        try:
            yield
        finally:
            self._naming.subtract(digests)
            self._naming += Counter()  # drops the zeros

    # --- for open_uploads --------------------------------------------------------------------------------------------

    async def run_sweep(self) -> NoReturn:
        """Remove, now and then, what nobody came back for."""
        while True:
            await trio.sleep(SWEEP_S)
            # Each is looked at in its turn: while others were thrown away it may have been used.
            for upload in list(self._open.values()):
                if trio.current_time() - upload.used_s >= IDLE_S and not upload.busy.locked():
                    await self.cancel(upload)
            for digest in list(self._loose):
                await self._remove_loose(digest)

    async def _remove_loose(self, digest: Sha256) -> None:
        """Remove a pushed blob if its time is over and nothing names it."""
        async with self._removing:
            since_s = self._loose.get(digest)
            if since_s is None or trio.current_time() - since_s < KEPT_S or digest in self._naming:
                return
            del self._loose[digest]
            if all(digest != layer.digest for stored in self._local() for layer in stored.manifest.blobs):
                await isolate("loose blob", partial(self._remove, digest))

    async def aclose(self) -> None:
        """Throw away what is under way."""
        for upload in list(self._open.values()):
            await self.cancel(upload)


@asynccontextmanager
async def open_uploads(uploads: Uploads) -> AsyncIterator[Uploads]:
    """The uploads, swept while inside; those that are not finished at the end are thrown away."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uploads.run_sweep)
        try:
            yield uploads
        finally:
            with trio.CancelScope(shield=True):
                await uploads.aclose()
            nursery.cancel_scope.cancel()
