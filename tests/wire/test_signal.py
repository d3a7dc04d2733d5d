"""The signalling protocol's messages: what is taken, and that nothing else is."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.traversal import Candidate
from meshmax.wire import signal as wire
from meshmax.wire.frames import HEADER_BYTES

ID = bytes(range(wire.ATTEMPT_ID_BYTES))
CANDIDATE = Candidate("srflx", "tcp", "198.51.100.7", 40_000)
VOUCHER = Signed(PeerId("12D3KooWx"), b"p" * 100, b"s" * 64)
MESSAGES = (
    wire.Offer(ID, "control", (CANDIDATE,), True, "v=0", False, (VOUCHER,)),
    wire.Answer(ID, 0.25, (CANDIDATE,), True, "v=0", (VOUCHER,)),
    wire.Go(ID),
    wire.Trickle(ID, (CANDIDATE,), "v=0"),
    wire.Decline(ID, "busy", 1.5),
    wire.Done(ID, True),
)


def bare(message: wire.Message) -> bytes:
    return wire.MESSAGES.encode(message)[HEADER_BYTES:]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_arrive_as_they_were_sent(message: wire.Message) -> None:
    assert wire.MESSAGES.decode(bare(message)) == message


def test_the_bytes_of_messages_are_fixed() -> None:
    assert bare(wire.Go(ID)).hex() == "82a474797065a2676fa7617474656d7074c410" + ID.hex()
    assert bare(wire.Trickle(ID, (CANDIDATE,))).hex() == (
        "83a474797065a7747269636b6c65a7617474656d7074c410" + ID.hex()
        + "aa63616e646964617465739194a57372666c78a3746370ac3139382e35312e3130302e37cd9c40"
    )  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        wire.Go(ID[:-1]),
        wire.Go(ID + b"x"),
        wire.Offer(ID, "file"),  # type: ignore[arg-type]
        wire.Offer(ID, candidates=(CANDIDATE,) * (wire.MAX_CANDIDATES + 1)),
        wire.Offer(ID, candidates=(Candidate("srflx", "tcp", "1" * 46, 40_000),)),
        wire.Offer(ID, candidates=(Candidate("srflx", "tcp", "198.51.100.7", 0),)),
        wire.Offer(ID, candidates=(Candidate("srflx", "tcp", "198.51.100.7", 65_536),)),
        wire.Offer(ID, candidates=(Candidate("srflx", "sctp", "198.51.100.7", 1),)),  # type: ignore[arg-type]
        wire.Offer(ID, sdp="v" * (wire.MAX_SDP + 1)),
        wire.Offer(ID, vouchers=(VOUCHER,) * (wire.MAX_VOUCHERS + 1)),
        wire.Answer(ID, -0.1),
        wire.Answer(ID, float("nan")),
        wire.Answer(ID, float("inf")),
        wire.Answer(ID, wire.MAX_PREPARED_S + 1),
        wire.Decline(ID, "because"),  # type: ignore[arg-type]
        wire.Decline(ID, "busy", -1.0),
        wire.Decline(ID, "busy", float("nan")),
    ],
)
def test_a_message_out_of_bounds_is_refused(message: wire.Message) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.MESSAGES.decode(bare(message))


def test_the_largest_offer_fits_and_a_larger_body_is_not_even_sent() -> None:
    sdp, voucher = "v" * wire.MAX_SDP, Signed(PeerId("1" * 52), b"p" * 256, b"s" * 64)
    far = Candidate("srflx", "tcp", "f" * 45, 65_535)
    whole = wire.Offer(ID, "control", (far,) * wire.MAX_CANDIDATES, True, sdp, True, (voucher,) * wire.MAX_VOUCHERS)
    assert wire.MESSAGES.decode(bare(whole)) == whole
    huge = Signed(PeerId("1" * 52), b"p" * 20_000, b"s" * 64)
    with pytest.raises(LocalProtocolError):
        wire.MESSAGES.encode(msgspec.structs.replace(whole, vouchers=(huge,)))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_cut_short_is_refused(message: wire.Message) -> None:
    body = bare(message)
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            wire.MESSAGES.decode(body[:length])


@given(st.sampled_from(MESSAGES), st.integers(0, 5000))
def test_a_flipped_bit_gives_another_valid_message_or_a_refusal(message: wire.Message, bit: int) -> None:
    body = bytearray(bare(message))
    body[bit // 8 % len(body)] ^= 1 << bit % 8
    with contextlib.suppress(RemoteProtocolError):
        wire.MESSAGES.decode(bytes(body))
