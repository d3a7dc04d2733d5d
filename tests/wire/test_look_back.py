"""The look-back protocol's messages: what is taken, and that nothing else is."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import look_back as wire
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES

NONCE = bytes(range(wire.NONCE_BYTES))
LOOK = wire.Look(NONCE, (wire.PortAsk("control", 11435), wire.PortAsk("udp", 11435)))
SEEN = wire.Seen(
    (wire.RungSeen("mdns", 1.5, ("/ip4/10.0.0.1/tcp/11435",)), wire.RungSeen("dht", None)),
    "/ip4/10.0.0.1/tcp/40000",
    1.8e9,
    (wire.PortTried("control", 11435, "open"),),
)


def test_messages_arrive_as_they_were_sent() -> None:
    assert wire.FROM_ASKER.decode(wire.FROM_ASKER.encode(LOOK)[HEADER_BYTES:]) == LOOK
    for reply in (SEEN, Failure("busy", "later", 2.0)):
        assert wire.FROM_ASKED.decode(wire.FROM_ASKED.encode(reply)[HEADER_BYTES:]) == reply


def test_the_bytes_of_messages_are_fixed() -> None:
    assert wire.FROM_ASKER.encode(LOOK).hex() == (
        "0000003e83a474797065a46c6f6f6ba56e6f6e6365c410" + NONCE.hex()
        + "a5706f7274739292a7636f6e74726f6ccd2cab92a3756470cd2cab"
    )  # fmt: skip


@pytest.mark.parametrize(
    "look",
    [
        wire.Look(NONCE[:-1]),
        wire.Look(NONCE + b"x"),
        wire.Look(NONCE, (wire.PortAsk("control", 22),)),
        wire.Look(NONCE, (wire.PortAsk("control", 65536),)),
        wire.Look(NONCE, (wire.PortAsk("smtp", 2525),)),  # type: ignore[arg-type]
        wire.Look(NONCE, (wire.PortAsk("lane", 2525),) * (wire.MAX_PORTS + 1)),
    ],
)
def test_a_question_out_of_bounds_is_refused(look: wire.Look) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.FROM_ASKER.decode(wire.FROM_ASKER.encode(look)[HEADER_BYTES:])


@pytest.mark.parametrize(
    "changes",
    [
        {"unix_s": float("nan")},
        {"unix_s": float("inf")},
        {"unix_s": -1.0},
        {"address": "/" * 401},
        {"rungs": (wire.RungSeen("mdns", -1.0),)},
        {"rungs": (wire.RungSeen("m" * 65, 1.0),)},
        {"rungs": (wire.RungSeen("mdns", 1.0),) * (wire.MAX_RUNGS + 1)},
        {"rungs": (wire.RungSeen("mdns", 1.0, ("/a",) * (wire.MAX_RUNG_ADDRESSES + 1)),)},
        {"ports": (wire.PortTried("control", 1, "opened"),)},  # type: ignore[arg-type]
    ],
)
def test_an_answer_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    body = wire.FROM_ASKED.encode(msgspec.structs.replace(SEEN, **changes))[HEADER_BYTES:]
    with pytest.raises(RemoteProtocolError):
        wire.FROM_ASKED.decode(body)


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_a_message(body: bytes) -> None:
    for codec in (wire.FROM_ASKER, wire.FROM_ASKED):
        with contextlib.suppress(RemoteProtocolError):
            codec.decode(body)


def test_every_truncation_of_an_answer_is_refused() -> None:
    body = wire.FROM_ASKED.encode(SEEN)[HEADER_BYTES:]
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            wire.FROM_ASKED.decode(body[:length])


def test_a_probe_carries_the_nonce_and_nothing_else_is_a_probe() -> None:
    assert wire.try_nonce(wire.probe_of(NONCE)) == NONCE
    assert wire.try_nonce(wire.probe_of(NONCE) + b"x") is None
    assert wire.try_nonce(wire.probe_of(NONCE)[:-1]) is None
    assert wire.try_nonce(b"\xd8" + NONCE) is None
    assert wire.try_nonce(b"") is None
