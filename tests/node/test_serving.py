"""Which UDP port a node takes."""

from typing import Any, cast

import pytest

from meshmax.base.config import Config
from meshmax.node.serving import with_udp_port


class Somewhere:
    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses


@pytest.mark.parametrize(
    ("config", "addresses", "port"),
    [
        (Config(), ("/ip4/192.0.2.1/tcp/7000/p2p/x",), 7000),
        (Config(), ("/ip6/2001:db8::1/tcp/7001/p2p/x", "/ip4/192.0.2.1/tcp/7000/p2p/x"), 7001),
        (Config(dht_port=9), ("/ip4/192.0.2.1/tcp/7000/p2p/x",), 9),
        (Config(dht_port=0), ("/ip4/192.0.2.1/tcp/7000/p2p/x",), 0),
        (Config(), (), 11435),
        (Config(), ("/memory/1/p2p/x",), 11435),
    ],
)
def test_the_udp_port_has_the_number_of_the_control_port_unless_another_was_asked_for(
    config: Config, addresses: tuple[str, ...], port: int
) -> None:
    assert with_udp_port(config, cast(Any, Somewhere(*addresses))).dht_port == port
