"""Registries both ways, opened: upstream ones for pulls, and this node as one. For meshmax.node.

Not here: what each part decides (services.upstream, repositories, pull_through, uploads).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from meshmax.base.config import Config
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.upstreams import parse_upstreams
from meshmax.core.backoff import Random
from meshmax.ports import BlobStore, Presence, Pulls, Swarm, Throttle
from meshmax.services.catalog import CatalogService
from meshmax.services.pull_through import open_pull_through
from meshmax.services.registry_ports import BlobStaging, Registry
from meshmax.services.repositories import Repositories
from meshmax.services.uploads import Uploads, open_uploads
from meshmax.services.upstream import Upstreams
from meshmax.services.upstream_pull import UpstreamPulls

OpenRegistry = Callable[[], AbstractAsyncContextManager[Registry]]


class RemovingBlobStore(BlobStore, Protocol):
    """A store that can forget a whole blob."""

    async def remove(self, digest: Sha256) -> None:
        """Delete a blob that no manifest refers to."""
        ...


class Store(Protocol):
    """Blobs, and a place where they are put together."""

    @property
    def blobs(self) -> RemovingBlobStore:
        """The blobs."""
        ...

    @property
    def staging(self) -> BlobStaging:
        """Where those from outside are put together."""
        ...


@asynccontextmanager
async def open_upstream(
    open_registry: OpenRegistry | None,
    staging: BlobStaging,
    catalog: CatalogService,
    config: Config,
    random: Random,
    throttle: Throttle | None = None,
) -> AsyncIterator[UpstreamPulls | None]:
    """Pulls from the registries of ``config``; None where there is no way out (``open_registry`` None)."""
    if open_registry is None:
        yield None
        return
    async with open_registry() as registry:
        entries = parse_upstreams(config.upstreams)
        upstreams = Upstreams(registry, staging, entries, random, config.offline, throttle)
        yield UpstreamPulls(upstreams, catalog.publish)


@asynccontextmanager
async def open_served(
    store: Store,
    catalog: CatalogService,
    swarm: Swarm,
    presence: Presence,
    pulls: Pulls,
    upstream: UpstreamPulls | None,
) -> AsyncIterator[tuple[Repositories, Uploads]]:
    """This node as a registry: what it offers, and what is pushed to it."""

    def holders(digest: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        online = (view for view in presence.peers() if view.state not in ("self", "offline"))
        return {
            view.peer_id: view.status.addresses
            for view in online
            if view.status and any(model.digest == digest and not model.served for model in view.status.models)
        }

    remove: Callable[[Sha256], Awaitable[None]] = store.blobs.remove
    uploads = Uploads(store.staging, store.blobs, catalog.publish, catalog.local, remove)
    async with open_pull_through(pulls, store.blobs) as through, open_uploads(uploads):
        upstreams = upstream.upstreams if upstream else None
        yield Repositories(catalog, store.blobs, catalog.local, swarm, holders, through, upstreams), uploads
