"""Which ports of a node its router is asked to forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from meshmax.base.reachability import PortMapping
from meshmax.core.port_mapping import PortWanted
from meshmax.node.mapping import mapped_addresses, ports_of

LAN, LOOPBACK = "/ip4/192.168.1.5/tcp/11435/p2p/x", "/ip4/127.0.0.1/tcp/11435/p2p/x"
PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def node(
    *addresses: str, wanted: bool = True, lane_port: int = 11436, udp_port: int = 11435, mapping: Any = None
) -> Any:
    addresses = tuple(text.replace("/p2p/x", f"/p2p/{PEER}") for text in addresses)
    return SimpleNamespace(
        swarm=SimpleNamespace(addresses=addresses),
        traversal=SimpleNamespace(wanted=wanted, mapping=mapping),
        lane_port=lane_port,
        serving=SimpleNamespace(udp_port=udp_port),
    )


def test_control_lanes_and_datagrams_are_wanted() -> None:
    assert ports_of(node(LOOPBACK, LAN)) == (
        PortWanted("tcp", 11435),
        PortWanted("tcp", 11436),
        PortWanted("udp", 11435),
    )


def test_ports_that_are_not_there_are_not_wanted() -> None:
    assert ports_of(node(LAN, lane_port=0, udp_port=0)) == (PortWanted("tcp", 11435),)


def test_nothing_is_wanted_on_loopback_alone_nor_in_the_open_mesh() -> None:
    assert ports_of(node(LOOPBACK)) == ()
    assert ports_of(node()) == ()
    assert ports_of(node(LAN, wanted=False)) == ()
    assert ports_of(node("/ip6/fd00::5/tcp/11435/p2p/x")) == ()  # it needs no mapping of addresses


def test_told_is_where_the_control_port_is_mapped() -> None:
    mappings = (
        PortMapping("tcp", 11435, "11.22.33.1", 40001, "upnp", 1e9),
        PortMapping("tcp", 11436, "11.22.33.1", 40002, "upnp", 1e9),
        PortMapping("udp", 11435, "11.22.33.1", 40003, "upnp", 1e9),
    )
    assert mapped_addresses(node(LAN, mapping=SimpleNamespace(mappings=mappings))) == ("/ip4/11.22.33.1/tcp/40001",)
    assert mapped_addresses(node(LAN)) == ()
    assert mapped_addresses(node(LAN, wanted=False, mapping=SimpleNamespace(mappings=mappings))) == ()
