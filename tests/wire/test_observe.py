"""Observe messages: golden bytes and bounds."""

import pytest

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import observe
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES
from meshmax.wire.look_back import probe_of

OBSERVED = observe.Observed("/ip4/192.0.2.1/tcp/4", 11435, 11437, ("stun",))


def test_messages_are_the_bytes_that_they_were() -> None:
    assert observe.FROM_ASKER.encode(observe.Observe()).hex() == "0000000e" + "81a474797065a76f627365727665"
    data = observe.FROM_OBSERVER.encode(OBSERVED)
    assert data[HEADER_BYTES:].startswith(
        b"\x85\xa4type\xa8observed\xa7address\xb4/ip4/192.0.2.1/tcp/4\xa8udp_port\xcd"
    )
    assert observe.FROM_OBSERVER.decode(data[HEADER_BYTES:]) == OBSERVED


NONCE = bytes(range(16))


@pytest.mark.parametrize("question", [observe.Observe(), observe.Probe(11435, NONCE, "other"), observe.Knock(11435)])
def test_a_question_arrives_as_it_was_asked(question: observe.FromAsker) -> None:
    assert observe.FROM_ASKER.decode(observe.FROM_ASKER.encode(question)[HEADER_BYTES:]) == question


@pytest.mark.parametrize(
    "reply",
    [
        observe.Observed("/ip4/192.0.2.1/tcp/4", 1, 2, ("stun",), b"v" * 250),
        observe.Probed(True),
        observe.Knocked("silent"),
        Failure("busy", "later", 2.0),
    ],
)
def test_a_reply_arrives_as_it_was_given(reply: observe.FromObserver) -> None:
    assert observe.FROM_OBSERVER.decode(observe.FROM_OBSERVER.encode(reply)[HEADER_BYTES:]) == reply


def test_a_probe_is_smaller_than_its_question() -> None:
    assert len(probe_of(NONCE)) < len(observe.FROM_ASKER.encode(observe.Probe(1024, NONCE)))


@pytest.mark.parametrize(
    "wrong",
    [
        observe.Probe(1023, NONCE),
        observe.Probe(65536, NONCE),
        observe.Probe(5000, NONCE[1:]),
        observe.Probe(5000, NONCE, "elsewhere"),  # type: ignore[arg-type]
        observe.Knock(22),
        observe.Knock(443),
    ],
)
def test_low_ports_and_odd_nonces_are_refused(wrong: observe.FromAsker) -> None:
    with pytest.raises(RemoteProtocolError):
        observe.FROM_ASKER.decode(observe.FROM_ASKER.encode(wrong)[HEADER_BYTES:])


@pytest.mark.parametrize(
    "wrong",
    [
        observe.Observed("x" * (observe.MAX_ADDRESS + 1)),
        observe.Observed("", 65536),
        observe.Observed("", 0, -1),
        observe.Observed("", 0, 0, ("x",) * (observe.MAX_SERVICES + 1)),
        observe.Observed("", 0, 0, ("x" * (observe.MAX_SERVICE + 1),)),
        observe.Observed("", 0, 0, (), b"v" * 257),
    ],
)
def test_what_is_out_of_bounds_is_refused(wrong: observe.Observed) -> None:
    with pytest.raises(RemoteProtocolError):
        observe.FROM_OBSERVER.decode(observe.FROM_OBSERVER.encode(wrong)[HEADER_BYTES:])


def test_every_truncation_is_refused() -> None:
    body = observe.FROM_OBSERVER.encode(OBSERVED)[HEADER_BYTES:]
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            observe.FROM_OBSERVER.decode(body[:length])
