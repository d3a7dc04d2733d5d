"""Where a node's control port is, as it asks to be dialled back there."""

import pytest

from meshmax.node.whereabouts import control_port_of


@pytest.mark.parametrize(
    ("addresses", "port"),
    [
        ((), 0),
        (("/memory/1/p2p/x",), 0),
        (("/ip4/192.0.2.1/tcp/7000",), 7000),
        (("/ip6/2001:db8::1/tcp/7001", "/ip4/192.0.2.1/tcp/7000"), 7001),
    ],
)
def test_the_control_port_is_that_of_our_addresses(addresses: tuple[str, ...], port: int) -> None:
    assert control_port_of(addresses) == port
