"""Manifests of models: Ollama's JSON, read with bounds and written as Ollama writes it.

A manifest read from outside is kept as the very bytes it came in, since the model's digest is of those bytes; only its
config and layers are looked at, and unknown fields are passed over. Decided here: which manifests are valid. Not here:
the config's content (store), where manifests lie (store), who published one (model records).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import Sha256, parse_sha256
from meshmax.base.model import MANIFEST_MEDIA_TYPE, MAX_BLOB_BYTES, MAX_LAYERS, MAX_MANIFEST_BYTES, Layer, Manifest

SCHEMA_VERSION: Final = 2
MAX_MEDIA_TYPE: Final = 255  # characters, RFC 6838 section 4.2: 127 for each side of the slash


class _JsonLayer(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}):
    media_type: Annotated[str, msgspec.Meta(max_length=MAX_MEDIA_TYPE)]
    digest: Annotated[str, msgspec.Meta(max_length=71)]
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]


class _JsonManifest(msgspec.Struct, frozen=True, rename={"schema_version": "schemaVersion", "media_type": "mediaType"}):
    schema_version: int
    config: _JsonLayer
    layers: Annotated[tuple[_JsonLayer, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    media_type: str = MANIFEST_MEDIA_TYPE


_decoder: Final = msgspec.json.Decoder(_JsonManifest)


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in ``raw`` (at most MAX_MANIFEST_BYTES, at most MAX_LAYERS layers). Raises ManifestInvalid."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"a manifest of {len(raw)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
    try:
        word = _decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ManifestInvalid(f"the manifest is not valid: {str(error)[:200]}") from None
    if word.schema_version != SCHEMA_VERSION:
        raise ManifestInvalid(f"the manifest has schema version {word.schema_version}; only {SCHEMA_VERSION} is read")
    config, *layers = (_layer(layer) for layer in (word.config, *word.layers))
    _check_sizes((config, *layers))
    return Manifest(digest_of(raw), raw, config, tuple(layers))


def build_manifest(config: Layer, layers: Sequence[Layer]) -> bytes:
    """The bytes of a new manifest, as Ollama would write it. Raises ManifestInvalid beyond the bounds of `parse_manifest`."""
    word = {
        "schemaVersion": SCHEMA_VERSION,
        "mediaType": MANIFEST_MEDIA_TYPE,
        "config": _json(config),
        "layers": [_json(layer) for layer in layers],
    }
    raw = msgspec.json.encode(word)
    parse_manifest(raw)
    return raw


def digest_of(data: bytes) -> Sha256:
    """The sha256 of ``data``."""
    return Sha256(hashlib.sha256(data).hexdigest())


def _json(layer: Layer) -> dict[str, str | int]:
    return {"mediaType": layer.media_type, "digest": f"sha256:{layer.digest}", "size": layer.size}


def _layer(word: _JsonLayer) -> Layer:
    try:
        digest = parse_sha256(word.digest)
    except InvalidRequest as error:
        raise ManifestInvalid(f"the manifest is not valid: {error.message}") from None
    return Layer(word.media_type, digest, word.size)


def _check_sizes(layers: Sequence[Layer]) -> None:
    sizes: dict[Sha256, int] = {}
    for layer in layers:
        if sizes.setdefault(layer.digest, layer.size) != layer.size:
            raise ManifestInvalid(f"the manifest gives blob {layer.digest[:12]} two different sizes")
