"""The drain protocol's messages: what is taken, and that nothing else is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.drain import MAX_DEADLINE_S, DrainView
from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import drain
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES

STANDING = drain.Standing("draining", 3, 12.5, 1)


def test_messages_arrive_as_they_were_sent() -> None:
    for ask in (drain.DrainAsk(60.0), drain.UndrainAsk(), drain.StandAsk()):
        assert drain.FROM_ASKER.decode(drain.FROM_ASKER.encode(ask)[HEADER_BYTES:]) == ask
    for reply in (STANDING, drain.Standing("drained", 0), Failure("refused", "no")):
        assert drain.FROM_ASKED.decode(drain.FROM_ASKED.encode(reply)[HEADER_BYTES:]) == reply


def test_the_bytes_of_messages_are_fixed() -> None:
    assert drain.FROM_ASKER.encode(drain.DrainAsk(60.0)).hex() == (
        "0000002082a474797065a5647261696eaa646561646c696e655f73cb404e000000000000"
    )
    assert drain.FROM_ASKER.encode(drain.StandAsk()).hex() == "0000000c81a474797065a57374616e64"


@pytest.mark.parametrize(
    "ask", [drain.DrainAsk(-1.0), drain.DrainAsk(MAX_DEADLINE_S + 1), drain.DrainAsk(float("nan"))]
)
def test_an_ask_out_of_bounds_is_refused(ask: drain.DrainAsk) -> None:
    with pytest.raises(RemoteProtocolError):
        drain.FROM_ASKER.decode(drain.FROM_ASKER.encode(ask)[HEADER_BYTES:])


@pytest.mark.parametrize(
    "standing",
    [
        drain.Standing("gone", 0),  # type: ignore[arg-type]
        drain.Standing("drained", -1),
        drain.Standing("drained", drain.MAX_RUNNING + 1),
        drain.Standing("draining", 0, float("inf")),
    ],
)
def test_a_standing_out_of_bounds_is_refused(standing: drain.Standing) -> None:
    with pytest.raises(RemoteProtocolError):
        drain.FROM_ASKED.decode(drain.FROM_ASKED.encode(standing)[HEADER_BYTES:])


def test_what_is_too_much_to_tell_is_cut() -> None:
    told = drain.standing_of(DrainView("draining", 10**9, -0.5, 10**9))
    assert told == drain.Standing("draining", drain.MAX_RUNNING, 0.0, drain.MAX_RUNNING)
    assert drain.view_of(STANDING) == DrainView("draining", 3, 12.5, 1)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_end_in_anything_but_a_protocol_error(body: bytes) -> None:
    for codec in (drain.FROM_ASKER, drain.FROM_ASKED):
        with contextlib.suppress(RemoteProtocolError):
            codec.decode(body)


def test_every_truncation_is_refused() -> None:
    body = drain.FROM_ASKED.encode(STANDING)[HEADER_BYTES:]
    for end in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            drain.FROM_ASKED.decode(body[:end])
