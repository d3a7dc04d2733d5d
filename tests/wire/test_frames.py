"""Frames: bounds are checked before anything is allocated, garbage is an error of the tree."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.wire.frames import MAX_FRAME_BYTES, Codec, body_length


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    n: int
    data: bytes = b""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    n: int


CODEC: Codec[Ping | Pong] = Codec(Ping | Pong)


def test_the_bytes_of_a_frame_are_fixed() -> None:
    assert CODEC.encode(Pong(7)) == bytes.fromhex("0000000e82a474797065a4706f6e67a16e07")


@given(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=100))
def test_a_message_reads_back_the_same(n: int, data: bytes) -> None:
    frame = CODEC.encode(Ping(n, data))
    assert body_length(frame[:4]) == len(frame) - 4
    assert CODEC.decode(frame[4:]) == Ping(n, data)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_an_announced_length_out_of_bounds_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="allowed are 1 to"):
        body_length(length.to_bytes(4, "big"))


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError):
        CODEC.encode(Ping(1, bytes(MAX_FRAME_BYTES)))


def test_a_codec_of_small_messages_takes_and_sends_no_large_ones() -> None:
    small: Codec[Ping] = Codec(Ping, 100)
    with pytest.raises(LocalProtocolError):
        small.encode(Ping(1, bytes(100)))
    with pytest.raises(RemoteProtocolError, match="allowed are 1 to 100"):
        body_length((101).to_bytes(4, "big"), small.max_bytes)


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(body: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        CODEC.decode(body)


def test_every_truncation_and_every_flipped_bit_is_an_error_or_another_message() -> None:
    body = CODEC.encode(Ping(5, b"abc"))[4:]
    for end in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            CODEC.decode(body[:end])
    for bit in range(8 * len(body)):
        changed = bytearray(body)
        changed[bit >> 3] ^= 1 << (bit & 7)
        try:
            CODEC.decode(changed)
        except RemoteProtocolError:
            continue


def test_a_deeply_nested_message_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        CODEC.decode(b"\x91" * 100_000)
