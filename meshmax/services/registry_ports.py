"""What services need to exchange models with registries: a client of them, and a place for blobs without a chunk map.

Adapters: net.registry_client.RegistryClient, store.staging.Staging.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from meshmax.base.ids import Sha256
from meshmax.base.model import ChunkMap
from meshmax.base.names import ModelName
from meshmax.base.upstreams import Upstream
from meshmax.core.spans import Spans


class BlobBody(Protocol):
    """The bytes of a blob as a registry sends them."""

    @property
    def whole(self) -> bool:
        """Whether they are the whole blob from its first byte on, whatever was asked."""
        ...

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end. Raises PeerGone."""
        ...


class Registry(Protocol):
    """Upstream registries."""

    async def fetch_manifest(self, upstream: Upstream, name: ModelName) -> bytes:
        """The manifest's bytes. Raises ModelNotFound, Refused, Busy, ConnectError, PeerGone, IntegrityError."""
        ...

    def open_blob(
        self, upstream: Upstream, name: ModelName, digest: Sha256, size: int, span: tuple[int, int] | None
    ) -> AbstractAsyncContextManager[BlobBody]:
        """A blob of ``size`` bytes, or its bytes [start, end).

        Raises RangeRefused, BlobNotFound, Refused, Busy, ConnectError, PeerGone, IntegrityError (another size).
        """
        ...


class StagedBlob(Protocol):
    """A blob being put together. Raises StoreFull, StoreError."""

    @property
    def have(self) -> Spans:
        """What is there; to be read only."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Put bytes in their place; what is there already stays."""
        ...

    async def hash_on(self) -> bool:
        """Bring the digests forward by a step; False if they have come as far as they can."""
        ...

    async def finish(self, digest: Sha256) -> ChunkMap:
        """Check, and give the store the blob. Raises IntegrityError; what was there is then gone."""
        ...

    async def aclose(self) -> None:
        """Let go. Idempotent, never raises."""
        ...


class BlobStaging(Protocol):
    """Where blobs are put together."""

    async def open_download(self, digest: Sha256, size: int) -> StagedBlob:
        """Begin or take up a download of a blob; it survives restarts. Raises StoreFull, StoreError."""
        ...

    async def open_upload(self) -> StagedBlob:
        """A place for bytes whose digest comes last; it does not survive. Raises StoreError."""
        ...
