"""Manifests: Ollama's JSON in and out, and nothing beyond the bounds."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import Sha256
from meshmax.base.model import (
    CONFIG_MEDIA_TYPE,
    MANIFEST_MEDIA_TYPE,
    MAX_BLOB_BYTES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    MODEL_MEDIA_TYPE,
    Layer,
)
from meshmax.wire.manifest import build_manifest, parse_manifest

CONFIG = Layer(CONFIG_MEDIA_TYPE, Sha256("c" * 64), 485)
MODEL = Layer(MODEL_MEDIA_TYPE, Sha256("a" * 64), 4661211808)
RAW = build_manifest(CONFIG, [MODEL])


def _word(**changes: Any) -> dict[str, Any]:
    return {**json.loads(RAW), **changes}


def test_a_new_manifest_is_written_as_ollama_writes_it() -> None:
    assert (
        b'{"schemaVersion":2,"mediaType":"' + MANIFEST_MEDIA_TYPE.encode() + b'",'
        b'"config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"sha256:'
        + b"c" * 64
        + b'","size":485},"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:'
        + b"a" * 64
        + b'","size":4661211808}]}'
    ) == RAW


def test_a_manifest_keeps_its_very_bytes_and_their_digest() -> None:
    raw = json.dumps(_word(extra=[1]), indent=3).encode()
    manifest = parse_manifest(raw)
    assert manifest.raw == raw
    assert manifest.digest != parse_manifest(RAW).digest
    assert (manifest.config, manifest.layers) == (CONFIG, (MODEL,))
    assert manifest.size == 4661211808 + 485


def test_fields_of_newer_tools_are_passed_over() -> None:
    layer = {**_word()["layers"][0], "from": "/tmp/x", "name": "model.embed"}
    assert parse_manifest(json.dumps(_word(layers=[layer])).encode()).layers == (MODEL,)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"schemaVersion":2',
        b"[" * 100_000,
        json.dumps(_word(schemaVersion=1)).encode(),
        json.dumps(_word(schemaVersion="2")).encode(),
        json.dumps(_word(config=None)).encode(),
        json.dumps(_word(layers={})).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "size": -1}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "size": MAX_BLOB_BYTES + 1}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "size": 1.5}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "digest": "sha256:../../../etc/passwd"}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "digest": "sha512:" + "a" * 64}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "digest": "sha256:" + "A" * 64}])).encode(),
        json.dumps(_word(layers=[{**_word()["layers"][0], "mediaType": "x" * 256}])).encode(),
        json.dumps(_word(layers=[*_word()["layers"], {**_word()["layers"][0], "size": 7}])).encode(),
        json.dumps(_word(layers=_word()["layers"] * (MAX_LAYERS + 1))).encode(),
        RAW + b" " * MAX_MANIFEST_BYTES,
    ],
)
def test_a_manifest_that_is_not_valid_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw)


def test_every_truncation_is_refused() -> None:
    for length in range(len(RAW)):
        with pytest.raises(ManifestInvalid):
            parse_manifest(RAW[:length])


def test_a_bit_flip_is_refused_or_gives_another_model() -> None:
    for bit in range(8 * len(RAW)):
        data = bytearray(RAW)
        data[bit >> 3] ^= 1 << (bit & 7)
        try:
            manifest = parse_manifest(bytes(data))
        except ManifestInvalid:
            continue
        assert manifest.digest != parse_manifest(RAW).digest


@given(st.binary(max_size=200))
def test_garbage_gives_an_error_of_the_tree(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw)


@given(
    st.lists(st.tuples(st.text("abc/+.", max_size=20), st.integers(0, 2**256 - 1), st.integers(0, 2**41)), max_size=9)
)
def test_what_was_built_is_parsed(layers: list[tuple[str, int, int]]) -> None:
    words = list({digest: Layer(kind, Sha256(f"{digest:064x}"), size) for kind, digest, size in layers}.values())
    words = [word for word in words if word.digest != CONFIG.digest]
    manifest = parse_manifest(build_manifest(CONFIG, words))
    assert (manifest.config, list(manifest.layers)) == (CONFIG, words)


def test_a_manifest_beyond_the_bounds_is_not_built() -> None:
    with pytest.raises(ManifestInvalid):
        build_manifest(CONFIG, [MODEL] * (MAX_LAYERS + 1))
