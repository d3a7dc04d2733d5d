"""Chunks of a blob and who has which."""

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves, Layer, Manifest

A, B = Sha256("a" * 64), Sha256("b" * 64)


@given(st.integers(0, 5 * CHUNK_BYTES))
def test_the_spans_of_the_chunks_cover_the_blob_exactly(size: int) -> None:
    chunk_map = ChunkMap(A, size, bytes(32), bytes(32 * -(-size // CHUNK_BYTES)))
    spans = [chunk_map.span(index) for index in range(chunk_map.count)]
    assert sum(length for _, length in spans) == size
    assert all(length > 0 for _, length in spans)
    assert [offset for offset, _ in spans] == [index * CHUNK_BYTES for index in range(chunk_map.count)]


@given(st.integers(0, 100).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, max(count - 1, 0))))))
def test_a_bitmap_holds_exactly_the_chunks_that_were_put_in(case: tuple[int, set[int]]) -> None:
    count, chosen = case
    chosen = {index for index in chosen if index < count}
    haves = Haves.none(count)
    for index in chosen:
        haves = haves.with_chunk(index)
    assert {index for index in range(count) if index in haves} == chosen
    assert haves.total == len(chosen)
    assert set(haves.missing()) == set(range(count)) - chosen
    assert haves.whole == (len(chosen) == count)
    assert Haves.all(count).whole
    assert count not in haves
    assert -1 not in haves


def test_a_blob_that_stands_in_a_manifest_twice_is_needed_once() -> None:
    layer = Layer("x", B, 5)
    manifest = Manifest(A, b"{}", Layer("c", A, 1), (layer, layer))
    assert [blob.digest for blob in manifest.blobs] == [A, B]
    assert manifest.layer("x") == layer
    assert manifest.layer("y") is None
