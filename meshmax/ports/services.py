"""Services as faces and other services see them. Services satisfy these; meshmax.node joins them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal, Protocol

from meshmax.base.catalog import CatalogEntry, LoadedView, ModelDescription, Resolved
from meshmax.base.errors import MeshmaxError
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, Event, RoutedEvent
from meshmax.base.model import StoredModel
from meshmax.base.route import Route, Wishes
from meshmax.base.status import Device, Load, PeerView, Speed
from meshmax.ports.common import Progress

WISHES: Final = Wishes()


class Catalog(Protocol):
    """Names: what is here and what the mesh has."""

    def entries(self) -> tuple[CatalogEntry, ...]:
        """Every model, local and remote, newest first."""
        ...

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        """What ``name`` (or NAME@DIGEST) means: ours first, then the newest record or the digest first seen in the mesh.

        ``parts``: a model that nobody has whole, but somebody in parts, will do (for a pull). Raises InvalidName,
        ModelNotFound.
        """
        ...

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        """From our store, which alone can be ``verbose``, or asked of a holder.

        Raises InvalidName, ModelNotFound, NoProviders.
        """
        ...

    async def copy(self, source: str, destination: str) -> StoredModel:
        """Local models only, the source also as NAME@DIGEST. Raises InvalidName, ModelNotFound."""
        ...

    async def delete(self, name: str) -> None:
        """Local names only. Raises InvalidName, ModelNotFound."""
        ...

    async def add(self, name: str, path: Path, link: bool, progress: Progress) -> StoredModel:
        """Ingest a GGUF file, sign a model record, tell the mesh. Raises InvalidName, InvalidRequest, StoreFull."""
        ...


class Pulls(Protocol):
    """Transfers of models to here."""

    def open_pull(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Transfer]]:
        """Pull a model (or join the pull that is under way) and watch it; the last value has a final state.

        Leaving the block is not an error: when the last watcher leaves, the transfer is cancelled and the partials are kept.
        Raises InvalidName, NoProviders before the first value; later failures are a Transfer with state "failed".
        """
        ...

    async def start_download(self, name: str) -> Transfer:
        """Pull a model in the background, to the end, over restarts; a pull under way is made such a one.

        Raises InvalidName, NoProviders, Busy.
        """
        ...

    def transfers(self) -> tuple[Transfer, ...]:
        """Running ones and the last 100 ended ones, newest first; then what is sent to others, likewise."""
        ...

    async def steer(self, transfer_id: str, action: Literal["cancel", "pause", "resume"]) -> Transfer:
        """Steer a pull that is under way. Raises NotFound, InvalidRequest (it has ended, or is an outgoing one)."""
        ...


class Distribution(Protocol):
    """Asks other peers to pull a model."""

    async def distribute(self, name: str, peers: Sequence[PeerId]) -> Mapping[PeerId, str | MeshmaxError]:
        """Ask each of ``peers``: the id of its transfer, or why not. Raises InvalidName, ModelNotFound."""
        ...

    async def replicate(self, name: str, replicas: int) -> Mapping[PeerId, str | MeshmaxError]:
        """Ask as many as it takes until ``replicas`` peers have the model; none where they do already.

        Raises NotFound (there are not so many), InvalidName, ModelNotFound.
        """
        ...


class Answer(Protocol):
    """An answer under way. `events` ends with a Finish; before a Moved another peer spoke."""

    @property
    def route(self) -> Route:
        """The decision as of now: more is known of it once the answer has ended."""
        ...

    @property
    def events(self) -> AsyncIterator[RoutedEvent]:
        """The answer's events; the last is a Finish."""
        ...


class Router(Protocol):
    """Sends each request to the peer that will answer it soonest."""

    def open_answer(self, ask: Ask, wishes: Wishes = WISHES) -> AbstractAsyncContextManager[Answer]:
        """Entered when the first event is there (or the request has failed everywhere); leaving early cancels remote work.

        A peer that fails in the middle is replaced: Moved, and the rest. Its events raise what nobody could make good.

        Raises ModelNotFound, NoProviders, Busy, EngineError...: what the best peer said, when nobody could.
        """
        ...

    def routes(self) -> tuple[Route, ...]:
        """The last 200 requests, newest first, those under way too; never a word of the prompt."""
        ...

    def route(self, request_id: str) -> Route | None:
        """The newest request with this id, where it is remembered. Cheap."""
        ...


class Residency(Protocol):
    """Models in this node's memory, and who may use them."""

    def open_answer(
        self, ask: Ask, requester: PeerId | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Load if needed, wait for a slot, answer. A load-only request yields one Finish ("load" or "unload").

        ``requester``: the member that asks; None: ourselves.
        Raises ModelNotFound, Busy, EngineError.
        """
        ...

    def loaded(self) -> tuple[LoadedView, ...]:
        """Models in memory, longest remaining first."""
        ...

    def device(self, digest: Sha256) -> Device | None:
        """Where the model is in memory; None where it is not."""
        ...

    def load(self) -> Load:
        """Prompts running and queued now."""
        ...

    def speed(self, digest: Sha256) -> Speed:
        """What was measured of a model here, loaded now or not."""
        ...

    async def unload(self, digest: Sha256) -> None:
        """Unload when its running answers have ended; does not wait for that. No error if it is not loaded."""
        ...


class Presence(Protocol):
    """Who is there."""

    def peers(self) -> tuple[PeerView, ...]:
        """Ourselves first, then online peers by round trip, then those that were lost seconds ago (none after 15)."""
        ...

    def view(self, peer_id: PeerId) -> PeerView | None:
        """One peer, ourselves too; None if unknown."""
        ...
