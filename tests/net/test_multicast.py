import pytest

from meshmax.net.interfaces import Interface
from meshmax.net.multicast import MAX_WAYS, Way, choose

LO = Interface("lo", 1, ("127.0.0.1", "::1"))
ETH0 = Interface("eth0", 2, ("10.0.0.1", "10.0.0.9", "fe80::1", "fd00::1"))
ETH1 = Interface("eth1", 3, ("192.168.1.5",))
VETH = Interface("veth1", 4, ("fe80::9",))
TUNNEL = Interface("wg0", 5, ("10.9.0.1",), multicast=False)


@pytest.mark.parametrize(
    ("up", "chosen"),
    [
        ([], []),
        ([LO], ["127.0.0.1"]),
        ([LO, ETH0], ["127.0.0.1", "10.0.0.1", "fe80::1"]),
        ([ETH0, ETH1], ["10.0.0.1", "fe80::1", "192.168.1.5"]),
        ([LO, ETH1, VETH], ["127.0.0.1", "192.168.1.5"]),
        ([LO, VETH], ["127.0.0.1", "fe80::9"]),
        ([ETH1, TUNNEL], ["192.168.1.5"]),
        ([VETH, TUNNEL], []),
    ],
)
def test_mdns_goes_where_an_interface_has_an_address_of_use(up: list[Interface], chosen: list[str]) -> None:
    assert [way.ip for way in choose(up)] == chosen


def test_only_the_interfaces_that_were_named_are_used() -> None:
    assert choose([LO, ETH0, ETH1], ["10.0.0.9", "192.0.2.1"]) == (Way("eth0", 2, "10.0.0.9"),)
    assert choose([LO, ETH0], ["127.0.0.1"]) == (Way("lo", 1, "127.0.0.1", loopback=True),)
    assert choose([VETH, ETH1], ["fe80::9%veth1"]) == (Way("veth1", 4, "fe80::9"),)


def test_ipv6_can_be_left_out() -> None:
    assert [way.ip for way in choose([ETH0], ipv6=False)] == ["10.0.0.1"]


def test_the_ways_are_bounded() -> None:
    many = [Interface(f"br{n}", n, (f"10.{n}.0.1", f"fd00::{n:x}")) for n in range(1, 100)]
    assert len(choose(many)) == MAX_WAYS
