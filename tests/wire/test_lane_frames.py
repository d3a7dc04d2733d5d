"""Frames of a lane: what is changed, repeated, moved, left out or cut short does not open."""

from __future__ import annotations

import pytest

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.units import MIB
from meshmax.wire import lane_frames as frames
from meshmax.wire.blob import MAX_CHUNKS
from meshmax.wire.lane import AES_128_GCM, CHACHA20_POLY1305, KEY_BYTES
from meshmax.wire.lane_frames import FIRST_BYTES, Frame, Kind, Opener, Sealer

DIGEST = Sha256("ab" * 32)
CIPHERS = (AES_128_GCM, CHACHA20_POLY1305)


def pair(cipher: str = AES_128_GCM, from_fetcher: bool = False, room: int = 1024) -> tuple[Sealer, Opener]:
    key = bytes(range(KEY_BYTES[cipher]))
    return Sealer(cipher, key, room), Opener(cipher, key, from_fetcher)


def opened(opener: Opener, data: bytes) -> Frame:
    """As a reader does it; the test's own bytes must fit exactly."""
    opener.first[:] = data[:FIRST_BYTES]
    opener.rest()[:] = data[FIRST_BYTES:]
    return opener.open()


def opened_as_far_as_it_goes(opener: Opener, data: bytearray) -> Frame:
    """As a reader of an endless stream, in which zeros follow."""
    opener.first[:] = data[:FIRST_BYTES]
    rest = opener.rest()
    rest[:] = (data[FIRST_BYTES:] + bytes(len(rest)))[: len(rest)]
    return opener.open()


def chunk(sealer: Sealer, index: int, data: bytes) -> bytes:
    sealer.room[: len(data)] = data
    return bytes(sealer.seal_chunk(DIGEST, index, len(data)))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_chunk_comes_out_as_it_went_in(cipher: str) -> None:
    sealer, opener = pair(cipher)
    for index, data in enumerate([b"x", b"models" * 100, bytes(1024)]):
        frame = opened(opener, chunk(sealer, index, data))
        assert (frame.kind, frame.index, frame.digest, bytes(frame.body)) == (Kind.CHUNK, index, DIGEST, data)


def test_a_whole_chunk_of_1_mib_fits_and_not_a_byte_more() -> None:
    sealer, opener = pair(room=MIB)
    frame = opened(opener, chunk(sealer, 0, bytes(MIB)))
    assert len(frame.body) == MIB
    with pytest.raises(LocalProtocolError):
        sealer.seal_chunk(DIGEST, 0, MIB + 1)
    with pytest.raises(LocalProtocolError):
        sealer.seal_chunk(DIGEST, 0, 0)


@pytest.mark.parametrize(
    ("cipher", "golden"),
    [
        (
            "aes-128-gcm",
            "000000444fd68753999ba68be3897a686081b09d120680859fc16993fbf69df5371c57fd9bc81d74"
            "a187701b2eb9fa796dc27a14ffe3ede85248bb5aea147bfd15a0a4e1be3d16c7",
        ),
        (
            "chacha20-poly1305",
            "000000441eb84231ade6a6d613615c61af434e27531a585e4a06f0f7475357b9819edef7d9a3a3c6"
            "7a4597f6362af38fcfa5ab97ffc1823fb4f4f3e9cedab27c259bd679b2a24fae",
        ),
    ],
)
def test_a_frame_has_the_bytes_that_every_version_reads(cipher: str, golden: str) -> None:
    sealer, _ = pair(cipher)
    assert chunk(sealer, 7, b"data").hex() == golden


def test_what_a_fetcher_says_comes_out_as_it_went_in() -> None:
    sealer, opener = pair(from_fetcher=True)
    assert opened(opener, bytes(sealer.seal(Kind.HELLO))).kind is Kind.HELLO
    want = opened(opener, bytes(sealer.seal_want(DIGEST, [3, 1, MAX_CHUNKS - 1])))
    assert (want.kind, want.digest, want.indexes) == (Kind.WANT, DIGEST, (3, 1, MAX_CHUNKS - 1))
    cancel = opened(opener, bytes(sealer.seal(Kind.CANCEL, 5, 0, DIGEST)))
    assert (cancel.kind, cancel.index, cancel.digest) == (Kind.CANCEL, 5, DIGEST)
    assert opened(opener, bytes(sealer.seal(Kind.END))).kind is Kind.END


@pytest.mark.parametrize(("seconds", "told"), [(1.5, 1.5), (-1.0, 0.0), (1e9, 3600.0)])
def test_how_long_a_server_is_busy_is_told_within_bounds(seconds: float, told: float) -> None:
    sealer, opener = pair()
    frame = opened(opener, bytes(sealer.seal_busy(DIGEST, 2, seconds)))
    assert (frame.kind, frame.index, frame.retry_after_s) == (Kind.BUSY, 2, told)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_no_flipped_bit_goes_unnoticed(cipher: str) -> None:
    sealer, _ = pair(cipher)
    good = chunk(sealer, 1, b"0123456789")
    for bit in range(len(good) * 8):
        _, opener = pair(cipher)
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):  # a length that shrank or grew is out of bounds or not authentic
            opened_as_far_as_it_goes(opener, bad)


def test_a_frame_cut_anywhere_and_filled_up_does_not_open() -> None:
    good = chunk(pair()[0], 1, b"0123456789")
    for kept in range(4, len(good)):
        _, opener = pair()
        with pytest.raises(RemoteProtocolError):
            opened(opener, good[:kept] + bytes(len(good) - kept))


def test_a_replayed_frame_does_not_open() -> None:
    sealer, opener = pair()
    first = chunk(sealer, 0, b"one")
    opened(opener, first)
    with pytest.raises(RemoteProtocolError, match="not authentic"):
        opened(opener, first)


def test_reordered_frames_do_not_open() -> None:
    sealer, opener = pair()
    chunk(sealer, 0, b"one")
    second = chunk(sealer, 1, b"two")
    with pytest.raises(RemoteProtocolError, match="not the next one"):
        opened(opener, second)


def test_a_dropped_frame_is_noticed_at_the_next_one() -> None:
    sealer, opener = pair()
    opened(opener, chunk(sealer, 0, b"one"))
    chunk(sealer, 1, b"two")
    with pytest.raises(RemoteProtocolError, match="not the next one"):
        opened(opener, bytes(sealer.seal(Kind.END)))


def test_a_frame_does_not_open_under_another_key() -> None:
    sealer, _ = pair()
    frame = bytes(sealer.seal(Kind.END))
    with pytest.raises(RemoteProtocolError, match="not authentic"):
        opened(Opener(AES_128_GCM, b"k" * 16, False), frame)


@pytest.mark.parametrize("length", [0, 63, 64 + MIB + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_anything_more_is_read(length: int) -> None:
    _, opener = pair()
    opener.first[:4] = length.to_bytes(4, "big")
    with pytest.raises(RemoteProtocolError, match=f"frame of {length} bytes"):
        opener.rest()


def test_a_fetcher_is_held_to_the_length_of_a_want() -> None:
    _, opener = pair(from_fetcher=True)
    opener.first[:4] = (64 + 4 * frames.MAX_INDEXES).to_bytes(4, "big")
    assert len(opener.rest()) == 4 * frames.MAX_INDEXES
    opener.first[:4] = (64 + 4 * frames.MAX_INDEXES + 1).to_bytes(4, "big")
    with pytest.raises(RemoteProtocolError):
        opener.rest()


@pytest.mark.parametrize("from_fetcher", [True, False])
def test_each_end_may_say_only_what_is_its_own_to_say(from_fetcher: bool) -> None:
    theirs = {Kind.WELCOME, Kind.CHUNK, Kind.LACKING, Kind.BUSY, Kind.CANCELLED}
    refused = theirs if from_fetcher else {Kind.HELLO, Kind.WANT, Kind.CANCEL}
    for kind in refused:
        sealer, opener = pair(from_fetcher=from_fetcher)
        with pytest.raises(RemoteProtocolError, match=kind.name):
            opened(opener, bytes(sealer.seal(kind, 0, 1, DIGEST)))


def test_frames_that_are_sealed_well_and_still_not_valid_are_refused() -> None:
    for from_fetcher, kind, index, detail, body in [
        (False, 99, 0, 0, b""),
        (False, 0, 0, 0, b""),
        (False, Kind.CHUNK, 0, 0, b""),  # an empty chunk
        (False, Kind.END, 0, 0, b"x"),  # a body where none belongs
        (False, Kind.CHUNK, MAX_CHUNKS, 0, b"x"),
        (True, Kind.WANT, 0, 2, bytes(4)),  # fewer indexes than it says
        (True, Kind.WANT, 0, 0, bytes(4)),
        (True, Kind.WANT, 0, 1, bytes(5)),
        (True, Kind.WANT, 0, 1, b"\xff" * 4),
        (True, Kind.CANCEL, 2**32 - 1, 0, b""),
    ]:
        sealer, opener = pair(from_fetcher=from_fetcher)
        sealer.room[: len(body)] = body
        with pytest.raises(RemoteProtocolError):
            opened(opener, bytes(sealer._seal(kind, index, detail, DIGEST, len(body))))  # type: ignore[arg-type]


@pytest.mark.parametrize("indexes", [[], [-1], [MAX_CHUNKS], list(range(frames.MAX_INDEXES + 1))])
def test_we_want_nothing_that_a_peer_would_refuse(indexes: list[int]) -> None:
    with pytest.raises(LocalProtocolError):
        pair(from_fetcher=True)[0].seal_want(DIGEST, indexes)


def test_a_lane_ends_before_its_frame_numbers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAMES", 3)
    sealer, opener = pair()
    for index in range(2):
        assert not sealer.last
        opened(opener, chunk(sealer, index, b"x"))
    assert sealer.last
    opened(opener, bytes(sealer.seal(Kind.END)))
    with pytest.raises(LocalProtocolError, match="used up"):
        sealer.seal(Kind.END)
    with pytest.raises(RemoteProtocolError, match="more frames"):
        opener.open()


def test_the_bound_on_frames_keeps_the_margin_of_the_cipher() -> None:
    assert frames.MAX_FRAMES * MIB // 16 <= 2**34  # AES blocks under one key; RFC 8446 section 5.5 ends at 2^34.5
