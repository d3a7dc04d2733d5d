"""What a model is on disk and on the wire: manifest, layers, chunk maps, signed records.

A model is its manifest's digest; a name only points at it. The manifest's bytes travel as they are and are never
re-serialised, since the digest is of those bytes. A chunk map lists the BLAKE3 of each chunk of one blob; its own address
is the BLAKE3 of its canonical encoding (wire.chunkmap). A model record is what a publisher signs: name, manifest and the
address of each layer's chunk map. Not here: encodings (wire), files (store).
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.units import MIB

CHUNK_BYTES: Final = MIB
MAX_BLOB_BYTES: Final = 2 << 40  # 2 TiB: two million chunks, a chunk map of 64 MiB
MAX_MANIFEST_BYTES: Final = 512 << 10  # half a frame; Ollama's manifests have 1 to 50 KB
MAX_LAYERS: Final = 4096  # safetensors models have one layer a tensor

MODEL_MEDIA_TYPE: Final = "application/vnd.ollama.image.model"
TEMPLATE_MEDIA_TYPE: Final = "application/vnd.ollama.image.template"
SYSTEM_MEDIA_TYPE: Final = "application/vnd.ollama.image.system"
PARAMS_MEDIA_TYPE: Final = "application/vnd.ollama.image.params"
LICENSE_MEDIA_TYPE: Final = "application/vnd.ollama.image.license"
CONFIG_MEDIA_TYPE: Final = "application/vnd.docker.container.image.v1+json"
MANIFEST_MEDIA_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"


class Layer(msgspec.Struct, frozen=True):
    """One blob of a model: what it is (media type), its sha256 and its size in bytes."""

    media_type: str
    digest: Sha256
    size: int


class Manifest(msgspec.Struct, frozen=True):
    """A parsed manifest. ``digest`` is the sha256 of ``raw``, the very bytes it was parsed from."""

    digest: Sha256
    raw: bytes
    config: Layer
    layers: tuple[Layer, ...]

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """Every distinct blob that the model needs: the config, then the layers in order, each digest once."""
        return tuple({layer.digest: layer for layer in (self.config, *self.layers)}.values())

    @property
    def size(self) -> int:
        """Bytes of config and layers, as Ollama's ``size`` counts them."""
        return self.config.size + sum(layer.size for layer in self.layers)

    def layer(self, media_type: str) -> Layer | None:
        """The first layer of ``media_type``, or None."""
        return next((layer for layer in self.layers if layer.media_type == media_type), None)


class ChunkMap(msgspec.Struct, frozen=True):
    """The verified shape of one blob: every chunk but the last has ``chunk_bytes``; ``hashes`` are 32 bytes a chunk.

    ``blake3`` and ``sha256`` are of the whole blob. An empty blob has no chunks.
    """

    sha256: Sha256
    size: int
    blake3: bytes
    hashes: bytes
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """How many chunks the blob has."""
        return -(-self.size // self.chunk_bytes)

    def chunk_hash(self, index: int) -> bytes:
        """The BLAKE3 (32 bytes) that chunk ``index`` must have."""
        return self.hashes[32 * index : 32 * index + 32]

    def span(self, index: int) -> tuple[int, int]:
        """(offset, length) in bytes of chunk ``index`` in the blob."""
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size - offset)


class ModelRecord(msgspec.Struct, frozen=True):
    """What a publisher says of a model. ``name`` is a ModelName's ``full``; ``chunk_maps`` has an entry a blob.

    ``sequence`` grows with each record of one publisher for one name; the newest wins. ``issued_at_s`` is Unix time.
    """

    name: str
    manifest: Sha256
    chunk_maps: dict[Sha256, MapAddress]
    publisher: PeerId
    sequence: int
    issued_at_s: int


class Signed(msgspec.Struct, frozen=True):
    """Signed bytes as they travel: ``payload`` is canonical CBOR, ``signature`` Ed25519 of ``signer`` over domain + payload."""

    signer: PeerId
    payload: bytes
    signature: bytes


class ModelDetails(msgspec.Struct, frozen=True):
    """Facts of a model that Ollama shows in lists: from its config and GGUF header. Empty where unknown."""

    format: str = "gguf"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int = 0
    embedding_length: int = 0
    capabilities: tuple[str, ...] = ()


class StoredModel(msgspec.Struct, frozen=True):
    """A model that is whole in our store, under one name.

    ``kept``, of one that was just put: the name under which stays what its name meant before, if that may be the last copy.
    """

    name: str  # shortest form
    manifest: Manifest
    details: ModelDetails
    modified_at_s: float
    record: Signed | None = None
    kept: str = ""


class Haves(msgspec.Struct, frozen=True):
    """Which chunks of a blob somebody has: bit ``i`` of ``bits`` (least significant first in each byte) is chunk ``i``."""

    count: int
    bits: bytes

    def __contains__(self, index: object) -> bool:
        """Whether chunk ``index`` is there."""
        return isinstance(index, int) and 0 <= index < self.count and bool(self.bits[index >> 3] >> (index & 7) & 1)

    @property
    def total(self) -> int:
        """How many chunks are there."""
        return int.from_bytes(self.bits, "little").bit_count()

    @property
    def whole(self) -> bool:
        """Whether every chunk is there."""
        return self.total == self.count

    def missing(self) -> list[int]:
        """The chunks that are not there, ascending."""
        return [index for index in range(self.count) if index not in self]

    def with_chunk(self, index: int) -> Haves:
        """The same and chunk ``index``."""
        bits = bytearray(self.bits)
        bits[index >> 3] |= 1 << (index & 7)
        return Haves(self.count, bytes(bits))

    @classmethod
    def none(cls, count: int) -> Haves:
        """No chunk of ``count``."""
        return cls(count, bytes(-(-count // 8)))

    @classmethod
    def all(cls, count: int) -> Haves:
        """Every chunk of ``count``; the bits beyond the last chunk are zero."""
        return cls(count, ((1 << count) - 1).to_bytes(-(-count // 8), "little"))
