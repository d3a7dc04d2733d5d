"""Observe messages: golden bytes and bounds."""

import pytest

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire import observe
from meshmax.wire.frames import HEADER_BYTES

OBSERVED = observe.Observed("/ip4/192.0.2.1/tcp/4", 11435, 11437, ("stun",))


def test_messages_are_the_bytes_that_they_were() -> None:
    assert observe.FROM_ASKER.encode(observe.Observe()).hex() == "0000000e" + "81a474797065a76f627365727665"
    data = observe.FROM_OBSERVER.encode(OBSERVED)
    assert data[HEADER_BYTES:].startswith(
        b"\x85\xa4type\xa8observed\xa7address\xb4/ip4/192.0.2.1/tcp/4\xa8udp_port\xcd"
    )
    assert observe.FROM_OBSERVER.decode(data[HEADER_BYTES:]) == OBSERVED


@pytest.mark.parametrize(
    "wrong",
    [
        observe.Observed("x" * (observe.MAX_ADDRESS + 1)),
        observe.Observed("", 65536),
        observe.Observed("", 0, -1),
        observe.Observed("", 0, 0, ("x",) * (observe.MAX_SERVICES + 1)),
        observe.Observed("", 0, 0, ("x" * (observe.MAX_SERVICE + 1),)),
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
