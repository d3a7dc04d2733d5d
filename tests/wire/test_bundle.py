"""Bundles on paper: golden bytes, the layout for any split, and that nothing but what was signed is read."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest

from meshmax.base.errors import InvalidRequest, ManifestInvalid
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, Haves, Layer, Signed
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import bundle as wire
from meshmax.wire.bundle import BundleBlob, BundleIndex, BundleModel
from meshmax.wire.manifest import build_manifest
from meshmax.wire.signed import BUNDLE_DOMAIN, canonical, sign

SIGNER = SeededSigner(1)
NAME = "registry.ollama.ai/library/small:latest"


def blob(number: int, size: int, chunks: bytes | None = None) -> BundleBlob:
    count = -(-size // CHUNK_BYTES)
    return BundleBlob(f"{number:064x}", size, f"{number + 1000:064x}", 200 + 32 * count, chunks)


def index_of(*blobs: BundleBlob, part_bytes: int = 0) -> BundleIndex:
    layers = [Layer(MODEL_MEDIA_TYPE, Sha256(b.sha256), b.size) for b in blobs]
    config = Layer(CONFIG_MEDIA_TYPE, layers[0].digest, layers[0].size)
    model = BundleModel(NAME, build_manifest(config, layers), None)
    return BundleIndex(1, SIGNER.peer_id, "site-a", 1_761_498_924, part_bytes, (model,), blobs)


def sealed(index: BundleIndex) -> bytes:
    return wire.seal_index(index, SIGNER.sign)


def test_the_bytes_of_a_header_are_fixed() -> None:
    header = wire.encode_header(2, 3, b"envelope")
    assert header.hex() == (
        "6d6573686d61782062756e646c650a0000010000000000020000000300000008" + wire.bundle_id(b"envelope").hex()
    )
    assert wire.decode_header(header) == wire.Header(2, 3, 8, wire.bundle_id(b"envelope"))


def test_the_bytes_of_a_signed_index_are_fixed() -> None:
    envelope = sealed(index_of(blob(1, 10)))
    assert len(envelope) == GOLDEN_LENGTH
    assert wire.bundle_id(envelope).hex() == GOLDEN_ID


GOLDEN_LENGTH = 931
GOLDEN_ID = "d367a443f6883c0a0c4ea0e8030b7a8f2189616f972d8133c072a4ded91988fc"


def test_an_index_is_read_as_it_was_signed() -> None:
    index = index_of(blob(1, 10), blob(2, 3 * CHUNK_BYTES + 5, b"\x05"), part_bytes=1 << 22)
    assert wire.open_index(sealed(index)) == index


def test_every_flipped_bit_and_every_truncation_of_an_index_is_found() -> None:
    envelope = sealed(index_of(blob(1, 10)))
    for length in range(0, len(envelope), 7):
        with pytest.raises(ManifestInvalid):
            wire.open_index(envelope[:length])
    for at in range(8 * len(envelope)):
        flipped = bytearray(envelope)
        flipped[at >> 3] ^= 1 << (at & 7)
        with pytest.raises(ManifestInvalid):
            wire.open_index(bytes(flipped))


def test_every_flipped_bit_of_a_header_is_found_or_names_another_part_or_bundle() -> None:
    header = wire.encode_header(2, 3, b"envelope")
    right = wire.decode_header(header)
    for at in range(8 * len(header)):
        flipped = bytearray(header)
        flipped[at >> 3] ^= 1 << (at & 7)
        with contextlib.suppress(ManifestInvalid):
            assert wire.decode_header(bytes(flipped)) != right
    for length in range(len(header)):
        with pytest.raises(ManifestInvalid):
            wire.decode_header(header[:length])


def test_another_version_is_told_by_its_number() -> None:
    header = bytearray(wire.encode_header(1, 1, b"x"))
    header[17] = 9
    with pytest.raises(ManifestInvalid, match="version 9"):
        wire.decode_header(bytes(header))
    with pytest.raises(ManifestInvalid, match="version 2"):
        wire.open_index(sealed(msgspec.structs.replace(index_of(blob(1, 10)), version=2)))


def test_an_index_that_somebody_else_signed_or_in_another_domain_is_refused() -> None:
    index = index_of(blob(1, 10))
    other = SeededSigner(2)
    for signed in (
        sign(BUNDLE_DOMAIN, index, other.peer_id, other.sign),
        sign(BUNDLE_DOMAIN, index, SIGNER.peer_id, other.sign),
        sign(b"meshmax/status/1\n", index, SIGNER.peer_id, SIGNER.sign),
    ):
        with pytest.raises(ManifestInvalid):
            wire.open_index(_envelope(signed))


def _envelope(signed: Signed) -> bytes:
    return canonical({"signer": signed.signer, "payload": signed.payload, "signature": signed.signature})


@pytest.mark.parametrize(
    "changed",
    [
        {"blobs": ()},
        {"blobs": (blob(1, 10), blob(1, 10))},
        {"blobs": (blob(1, 11),)},
        {"blobs": (blob(1, 10, b""),)},
        {"blobs": (blob(1, 10, b"\x02"),)},
        {"blobs": (msgspec.structs.replace(blob(1, 10), map_bytes=1 << 20),)},
        {"blobs": (msgspec.structs.replace(blob(1, 10), size=-1),)},
        {"blobs": (msgspec.structs.replace(blob(1, 10), map="../etc"),)},
        {"models": ()},
        {"models": (BundleModel("../../etc/passwd", b"{}", None),)},
        {"models": (BundleModel(NAME, b"{}", None),)},
        {"exporter": PeerId("nobody")},
        {"part_bytes": -1},
    ],
)
def test_an_index_that_is_signed_and_not_sound_is_refused(changed: dict[str, object]) -> None:
    index = msgspec.structs.replace(index_of(blob(1, 10)), **changed)
    signed = sign(BUNDLE_DOMAIN, index, SIGNER.peer_id, SIGNER.sign)
    with pytest.raises(ManifestInvalid):
        wire.open_index(_envelope(signed))


def _random_blob(chance: random.Random, number: int) -> BundleBlob:
    size = chance.choice([0, 1, 500, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, chance.randrange(12 * CHUNK_BYTES)])
    count = -(-size // CHUNK_BYTES)
    if not count or chance.random() < 0.5:
        return blob(number, size)
    bits = chance.getrandbits(count) if chance.random() < 0.8 else 0
    return blob(number, size, bits.to_bytes(-(-count // 8), "little"))


@pytest.mark.parametrize("seed", range(300))
def test_for_any_split_every_chunk_lies_in_exactly_one_place_and_no_part_is_too_long(seed: int) -> None:
    chance = random.Random(seed)
    blobs = tuple(_random_blob(chance, number) for number in range(1, chance.randrange(2, 7)))
    envelope_bytes = chance.randrange(100, 5000)
    least = wire.HEADER_BYTES + envelope_bytes + CHUNK_BYTES + max(b.map_bytes for b in blobs)
    part_bytes = chance.choice([0, least, least + 1, least + chance.randrange(5 * CHUNK_BYTES), 1 << 40])
    parts = wire.lay_out(index_of(*blobs, part_bytes=part_bytes), envelope_bytes)
    found: dict[str, list[int]] = {b.sha256: [] for b in blobs}
    for number, part in enumerate(parts, 1):
        at = wire.HEADER_BYTES + envelope_bytes
        assert part.number == number
        for piece in part.pieces:
            assert piece.offset == at
            indexes = list(wire.chunks_of(piece))
            assert len(indexes) == piece.last - piece.first
            at += piece.blob.map_bytes + sum(piece.blob.length(i) for i in indexes)
            assert piece.end == at
            found[piece.blob.sha256] += indexes
        assert part.size == at
        assert not part_bytes or at <= part_bytes
    for b in blobs:
        assert found[b.sha256] == [i for i in range(b.count) if i in b.carried]
    if not part_bytes:
        assert len(parts) == 1


def test_parts_that_cannot_hold_a_chunk_are_refused_with_the_size_that_would_do() -> None:
    index = index_of(blob(1, 10), blob(2, 3 * CHUNK_BYTES), part_bytes=CHUNK_BYTES)
    with pytest.raises(InvalidRequest, match="bytes at least"):
        wire.lay_out(index, 400)


def test_more_parts_than_have_numbers_are_refused() -> None:
    index = index_of(blob(1, 20_000 * CHUNK_BYTES), part_bytes=2 * CHUNK_BYTES + 700_000)
    with pytest.raises(InvalidRequest, match="parts"):
        wire.lay_out(index, 400)


def test_a_model_whose_blobs_are_all_at_the_other_site_makes_one_part_without_chunks() -> None:
    nothing = Haves.none(3).bits
    parts = wire.lay_out(index_of(blob(1, 3 * CHUNK_BYTES, nothing), part_bytes=2000), 400)
    assert [(part.number, part.pieces) for part in parts] == [(1, ())]


def test_names_of_parts_sort_and_say_n_of_m_in_letters_that_every_file_system_takes() -> None:
    stem = wire.stem_of(["hf.co/Some/model:Q4_K_M", "llama3"])
    names = [wire.part_name(stem, number, 11) for number in range(1, 12)]
    assert names == sorted(names)
    assert names[1] == "model-Q4_K_M-and-1-more.0002-of-0011.meshmax"
    assert [wire.split_part_name(name) for name in names] == [(stem, n, 11) for n in range(1, 12)]
    assert wire.part_name("x", 1, 1) == "x.meshmax"
    assert wire.split_part_name("x.meshmax") is None


def test_an_index_with_too_much_in_it_is_refused_by_its_exporter() -> None:
    index = index_of(blob(1, 10))
    many = msgspec.structs.replace(index, models=index.models * (wire.MAX_MODELS + 1))
    with pytest.raises(InvalidRequest, match="fewer"):
        sealed(many)
