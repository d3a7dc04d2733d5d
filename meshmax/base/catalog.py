"""Models as lists and faces show them: what is here, what the mesh has, what is loaded."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Options
from meshmax.base.model import ModelDetails, StoredModel
from meshmax.base.names import ModelName
from meshmax.base.status import Device


class CatalogEntry(msgspec.Struct, frozen=True):
    """One name that this node can use. ``local``: whole in our store. ``fraction``: share of its bytes here, 0 to 1.

    ``holders`` are peers (ourselves too) that have it whole; ``partial_holders`` have some of it: sources for a pull, and
    never for a prompt. Two digests under one name make two entries. ``pinned``: a name here is tied to this digest.
    ``servers``: peers (ourselves too) whose engine brings the model along: they answer prompts, and cannot give it away.
    ``served``: we are one of them.
    """

    name: str  # shortest form
    digest: Sha256
    size: int
    modified_at_s: float
    details: ModelDetails
    local: bool
    holders: tuple[PeerId, ...] = ()
    fraction: float = 0.0
    partial_holders: tuple[PeerId, ...] = ()
    pinned: bool = False
    servers: tuple[PeerId, ...] = ()
    served: bool = False

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine for a person: in our store, or brought along by an engine here."""
        return self.local or self.served

    @property
    def anywhere(self) -> tuple[PeerId, ...]:
        """Peers that can show it and, with an engine, run it: who has it whole first."""
        return (*self.holders, *(peer for peer in self.servers if peer not in self.holders))


class FirstOffer(msgspec.Struct, frozen=True):
    """What a name meant when it was first heard of, and who offered it; ``origin`` is '' for ourselves or unknown."""

    digest: Sha256
    origin: PeerId | Literal[""] = ""


class Resolved(msgspec.Struct, frozen=True):
    """What a name means here and now: one digest, and our own copy if there is one."""

    name: str
    digest: Sha256
    entry: CatalogEntry
    stored: StoredModel | None = None


class TensorShape(msgspec.Struct, frozen=True):
    """One tensor; ``type`` as ggml names it, its number where that is newer than our table."""

    name: str
    type: str
    shape: tuple[int, ...]


class ModelDescription(msgspec.Struct, frozen=True, omit_defaults=True):
    """What /api/show tells of a model. ``model_info``: GGUF key-values, arrays of over 5 items as [] if not verbose.

    ``parameters`` is the params layer; texts are the layers of that name. Fits one frame: its maker cuts long texts.
    ``tensors`` only where it was asked to be verbose, which a model of ours alone can be.
    """

    digest: Sha256
    details: ModelDetails
    model_info: dict[str, Any] = {}
    template: str = ""
    system: str = ""
    license: str = ""
    parameters: dict[str, Any] = {}
    modified_at_s: float = 0.0
    tensors: tuple[TensorShape, ...] = ()


class ModelFile(msgspec.Struct, frozen=True):
    """What an engine needs to load a model: the GGUF's path, and the defaults that its manifest carries.

    ``cache_bytes_per_token``: keys and values that a token of context takes in memory, 0: not known.
    """

    digest: Sha256
    name: str
    path: str
    size: int
    details: ModelDetails = ModelDetails()
    system: str = ""
    parameters: Options = Options()
    cache_bytes_per_token: int = 0


class LoadedView(msgspec.Struct, frozen=True):
    """A model in memory, as /api/ps tells. ``expires_at_s`` Unix time, None: for ever. Sizes in bytes, 0: not known.

    ``origin``: whose it is, of one that an engine brings along (see OfferedModel).
    """

    name: str
    digest: Sha256
    size: int
    size_vram: int
    context_length: int
    device: Device
    details: ModelDetails
    expires_at_s: float | None
    running: int = 0
    queued: int = 0
    prefill_per_s: float = 0.0  # tokens a second, EWMA; 0 before the first answer
    decode_per_s: float = 0.0
    load_s: float = 0.0
    origin: str = ""


class InMemory(msgspec.Struct, frozen=True):
    """How an engine that brings its models along has one in memory. Sizes in bytes; ``expires_at_s`` as in LoadedView."""

    size: int = 0
    size_vram: int = 0
    context_length: int = 0
    expires_at_s: float | None = None


class OfferedModel(msgspec.Struct, frozen=True):
    """A model that an engine brings along: it runs there, and no file of it is ours.

    ``name`` in its shortest form; ``origin`` says in words whose it is ("the Ollama at http://127.0.0.1:11434").
    ``loaded`` None: not in memory now. ``device``: where it runs or would run, as far as is known. ``parallel``: answers at
    once, of all models of this engine together.
    """

    name: str
    digest: Sha256
    engine: str
    origin: str
    size: int = 0
    details: ModelDetails = ModelDetails()
    modified_at_s: float = 0.0
    loaded: InMemory | None = None
    device: Device = "cpu"
    parallel: int = 1


class BackendReport(msgspec.Struct, frozen=True):
    """How an engine that brings its models along stands. ``problem``: why it offers nothing, '' where it does."""

    engine: str
    models: int
    origin: str = ""
    problem: str = ""


class Listed(msgspec.Struct, frozen=True):
    """A name of the store with what it needs; ``problem``: why it cannot be used as it is, or ''."""

    name: ModelName
    digest: Sha256
    blobs: tuple[tuple[Sha256, int], ...]  # digest, size in bytes
    problem: str = ""
