"""The pull protocol's messages: what is taken, and that nothing else is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import pull
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES

ASK = pull.PullAsk("ab" * 32, "m")
PULLING = pull.Pulling("waiting", 5, 10, "nobody has it")


def test_messages_arrive_as_they_were_sent() -> None:
    assert pull.FROM_ASKER.decode(pull.FROM_ASKER.encode(ASK)[HEADER_BYTES:]) == ASK
    for reply in (PULLING, pull.Pulling("running"), pull.Pulled(), Failure("refused", "no")):
        assert pull.FROM_ASKED.decode(pull.FROM_ASKED.encode(reply)[HEADER_BYTES:]) == reply


def test_the_bytes_of_messages_are_fixed() -> None:
    assert pull.FROM_ASKED.encode(pull.Pulled()).hex() == "0000000d81a474797065a670756c6c6564"
    assert pull.FROM_ASKED.encode(PULLING).hex() == (
        "0000004a85a474797065a770756c6c696e67a57374617465a777616974696e67aa62797465735f646f6e6505"
        "ab62797465735f746f74616c0aa6726561736f6ead6e6f626f647920686173206974"
    )


@pytest.mark.parametrize(
    "ask",
    [
        pull.PullAsk("AB" * 32, "m"),
        pull.PullAsk("ab", "m"),
        pull.PullAsk("ab" * 32, ""),
        pull.PullAsk("ab" * 32, "x" * 999),
    ],
)
def test_an_ask_out_of_bounds_is_refused(ask: pull.PullAsk) -> None:
    with pytest.raises(RemoteProtocolError):
        pull.FROM_ASKER.decode(pull.FROM_ASKER.encode(ask)[HEADER_BYTES:])


@pytest.mark.parametrize(
    "news",
    [
        pull.Pulling("done"),  # type: ignore[arg-type]
        pull.Pulling("running", -1),
        pull.Pulling("running", 1, pull.MAX_MODEL_BYTES + 1),
        pull.Pulling("waiting", 1, 1, "x" * (pull.MAX_REASON + 1)),
    ],
)
def test_news_out_of_bounds_are_refused(news: pull.Pulling) -> None:
    with pytest.raises(RemoteProtocolError):
        pull.FROM_ASKED.decode(pull.FROM_ASKED.encode(news)[HEADER_BYTES:])


@given(st.binary(max_size=200))
def test_no_bytes_whatever_end_in_anything_but_a_protocol_error(body: bytes) -> None:
    for codec in (pull.FROM_ASKER, pull.FROM_ASKED):
        with contextlib.suppress(RemoteProtocolError):
            codec.decode(body)


def test_every_truncation_is_refused() -> None:
    body = pull.FROM_ASKED.encode(PULLING)[HEADER_BYTES:]
    for end in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            pull.FROM_ASKED.decode(body[:end])
