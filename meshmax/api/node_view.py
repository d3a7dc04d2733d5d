"""What the faces need of a node: the parts as ports, and a few facts. `meshmax.node.Node` satisfies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from meshmax.api.drain_routes import HasDraining
from meshmax.api.membership_routes import HasMembership
from meshmax.api.registry_routes import HasRepositories
from meshmax.api.registry_uploads import HasUploads
from meshmax.base.catalog import BackendReport, OfferedModel
from meshmax.base.config import Config
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import PeerView
from meshmax.base.traversal import PathStory
from meshmax.ports import BlobStore, Catalog, Distribution, Presence, Pulls, Residency, Router, Signer, Swarm
from meshmax.services.adopt import Adoption
from meshmax.services.bundles import Bundles
from meshmax.services.doctor import Doctor
from meshmax.services.fetchable import Fetchable
from meshmax.services.first_moments import FirstMoments
from meshmax.services.fsck import Fsck
from meshmax.services.garbage import Garbage
from meshmax.services.ladder import Ladder
from meshmax.services.leftovers import Leftovers
from meshmax.services.reachability import ReachabilityService
from meshmax.services.throttle import Limits

NodeState = Literal["starting", "running", "draining"]


class HasBlobs(Protocol):
    """A store, as far as the faces look into it."""

    @property
    def blobs(self) -> BlobStore:
        """The blobs."""
        ...


class WatchfulPresence(Presence, Protocol):
    """Presence that also looks out for copied identities, and remembers who was there."""

    def lost(self) -> tuple[PeerView, ...]:
        """Peers that are gone, as they were last known."""
        ...

    def watch(self, on_news: Callable[[], None], /) -> None:
        """Call ``on_news`` whenever a peer comes, goes or says something new."""
        ...

    @property
    def problem(self) -> str:
        """What a person should know of identities in this mesh, a sentence; '' when all is well."""
        ...


class _Services(Protocol):
    @property
    def catalog(self) -> Catalog:
        """Names."""
        ...

    @property
    def pulls(self) -> Pulls: ...

    @property
    def distribution(self) -> Distribution: ...

    @property
    def fetchable(self) -> Fetchable: ...

    @property
    def first_moments(self) -> FirstMoments: ...

    @property
    def router(self) -> Router: ...

    @property
    def residency(self) -> Residency: ...

    @property
    def presence(self) -> WatchfulPresence: ...

    @property
    def swarm(self) -> Swarm: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def fsck(self) -> Fsck: ...

    @property
    def garbage(self) -> Garbage: ...

    @property
    def ladder(self) -> Ladder: ...

    @property
    def doctor(self) -> Doctor: ...

    @property
    def reachability(self) -> ReachabilityService: ...

    @property
    def leftovers(self) -> Leftovers: ...

    @property
    def adoption(self) -> Adoption: ...

    @property
    def bundles(self) -> Bundles: ...


class _RegistryParts(HasRepositories, HasUploads, Protocol):
    pass


class _Facts(Protocol):
    @property
    def signer(self) -> Signer: ...

    @property
    def store(self) -> HasBlobs: ...

    @property
    def state(self) -> NodeState: ...

    def now(self) -> float:
        """Unix time in seconds."""
        ...

    def path_of(self, peer_id: PeerId) -> PathStory | None:
        """How the path to a connected peer came about."""
        ...

    async def seek(self, name: str, found: Callable[[], bool], /) -> bool:
        """See services.providers.ProviderSearch."""
        ...

    def resources(self) -> dict[str, Any]:
        """cpu_percent, memory_bytes, memory_total_bytes, disk_free_bytes, gpus: as mesh status shows them."""
        ...


class _TellsOfBackends(Protocol):
    def reports(self) -> tuple[BackendReport, ...]:
        """How each engine stands that brings its models along."""
        ...

    def by_digest(self, digest: Sha256, /) -> OfferedModel | None:
        """A model that one of them brings, or None."""
        ...


class HasBackends(Protocol):
    """Knows engines that bring their models along."""

    @property
    def backends(self) -> _TellsOfBackends:
        """Those of this node."""
        ...


class ApiNode(_Services, _RegistryParts, HasMembership, HasDraining, HasBackends, _Facts, Protocol):
    """A running node. ``token`` '' where there is none; ``started_at_s`` Unix time."""

    @property
    def config(self) -> Config:
        """What was configured."""
        ...

    @property
    def name(self) -> str:
        """What people call this node."""
        ...

    @property
    def token(self) -> str:
        """The API token, or nothing."""
        ...

    @property
    def started_at_s(self) -> float:
        """Unix time."""
        ...
