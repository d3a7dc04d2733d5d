import pytest

from meshmax.base.errors import InvalidRequest
from meshmax.net.addresses import (
    Circuit,
    Endpoint,
    concrete_addresses,
    interface_addresses,
    is_circuit,
    is_lan_address,
    multiaddr_of,
    parse_circuit,
    parse_endpoint,
    with_zones,
    without_own_loopback,
)
from meshmax.testing.memory_swarm import SeededSigner

PEER = SeededSigner(1).peer_id
RELAY = SeededSigner(2).peer_id


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/192.168.1.2/tcp/11435", Endpoint("192.168.1.2", 11435)),
        (f"/ip4/192.168.1.2/tcp/1/p2p/{PEER}", Endpoint("192.168.1.2", 1, PEER)),
        ("/ip6/::1/tcp/65535", Endpoint("::1", 65535)),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/9", Endpoint("fe80::1%eth0", 9)),
        ("/dns4/box.local/tcp/80", Endpoint("box.local", 80, None, name=True)),
    ],
)
def test_an_address_is_read(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "192.168.1.2:80",
        "/ip4/1.2.3/tcp/1",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/٣",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3.4/tcp/1/ws",
        "/ip4/1.2.3.4/tcp/1/p2p/QmNotEd25519",
        "/ip4/1.2.3.4/tcp/1/p2p",
        "/ip6/1.2.3.4/tcp/1",
        "/dns4/-bad-/tcp/1",
        "/dns4/a b/tcp/1",
        "/dns4/" + "a" * 300 + "/tcp/1",
        "/dns4/" + "a" * 64 + ".com/tcp/1",  # a resolver raises UnicodeError on it
        "/dns4/a..b/tcp/1",
        f"/ip4/1.2.3.4/tcp/1/p2p-circuit/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/1" * 50,
    ],
)
def test_what_is_no_address_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_endpoint(text)


@pytest.mark.parametrize("ip", ["192.168.7.1", "::1", "fe80::2%eth1"])
def test_an_address_is_written_as_it_is_read(ip: str) -> None:
    assert parse_endpoint(multiaddr_of(ip, 5, PEER)) == Endpoint(ip, 5, PEER)


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "127.9.9.9",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.9",
        "169.254.1.1",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:192.168.1.1",
    ],
)
def test_a_local_address_is_lan(ip: str) -> None:
    assert is_lan_address(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "8.8.8.8",
        "172.32.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "100.64.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "2001:db8::1",
        "2606:4700::1",
        "::ffff:8.8.8.8",
        "::",
        "box.local",
        "",
    ],
)
def test_any_other_address_is_not_lan(ip: str) -> None:
    assert not is_lan_address(ip)


def test_interfaces_are_listed_with_loopback_last() -> None:
    found = interface_addresses()
    assert "127.0.0.1" in found
    loopback = [ip.startswith("127.") or ip == "::1" for ip in found]
    assert loopback == sorted(loopback)


def test_a_wildcard_means_the_interfaces_of_its_family() -> None:
    interfaces = ["192.168.1.5", "fd00::5", "fe80::5%eth0", "127.0.0.1", "::1"]
    assert concrete_addresses("0.0.0.0", interfaces) == ["192.168.1.5", "127.0.0.1"]
    assert concrete_addresses("::", interfaces) == ["fd00::5", "::1"]
    assert concrete_addresses("10.0.0.1", interfaces) == ["10.0.0.1"]


def test_link_local_addresses_are_told_where_there_is_nothing_else() -> None:
    assert concrete_addresses("::", ["fe80::5%eth0", "127.0.0.1", "::1"]) == ["fe80::5", "::1"]
    assert concrete_addresses("::", ["10.0.0.1", "fe80::5%eth0", "127.0.0.1"]) == []


def test_a_link_local_address_is_tried_on_every_interface_that_it_may_be_on() -> None:
    assert with_zones("/ip6/fe80::1/tcp/5", ["eth0", "eth1"]) == (
        "/ip6zone/eth0/ip6/fe80::1/tcp/5",
        "/ip6zone/eth1/ip6/fe80::1/tcp/5",
    )
    assert with_zones("/ip6/fe80::1/tcp/5", []) == ()


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/10.0.0.1/tcp/5",
        "/ip6/fd00::1/tcp/5",
        "/ip6zone/eth7/ip6/fe80::1/tcp/5",
        "/dns/box.local/tcp/5",
        "rubbish",
    ],
)
def test_any_other_address_needs_no_interface(address: str) -> None:
    assert with_zones(address, ["eth0"]) == (address,)


LAN, ELSEWHERE, LOCAL = "/ip4/10.0.0.1/tcp/5", "/ip4/10.0.0.2/tcp/5", "/ip4/127.0.0.1/tcp/5"


@pytest.mark.parametrize(
    ("told", "tried"),
    [
        ((ELSEWHERE, LOCAL, "/ip6/::1/tcp/5"), (ELSEWHERE,)),
        ((LAN, LOCAL), (LAN, LOCAL)),
        ((LOCAL,), (LOCAL,)),
        ((ELSEWHERE, ELSEWHERE), (ELSEWHERE,)),
        ((LOCAL, "rubbish"), ("rubbish",)),
        (("/dns/box.local/tcp/5", LOCAL), ("/dns/box.local/tcp/5",)),
        ((), ()),
    ],
)
def test_a_loopback_address_is_tried_where_the_peer_may_be_on_this_machine(
    told: tuple[str, ...], tried: tuple[str, ...]
) -> None:
    assert without_own_loopback(told, lambda: ["10.0.0.1", "127.0.0.1"]) == tried


@pytest.mark.parametrize(
    ("text", "circuit"),
    [
        (f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}/p2p-circuit", Circuit(Endpoint("203.0.113.5", 9, RELAY))),
        (f"/dns/a.example/tcp/9/p2p/{RELAY}/p2p-circuit", Circuit(Endpoint("a.example", 9, RELAY, name=True))),
        (
            f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
            Circuit(Endpoint("203.0.113.5", 9, RELAY), PEER),
        ),
    ],
)
def test_an_address_over_a_relay_names_the_relay_and_who_is_behind_it(text: str, circuit: Circuit) -> None:
    assert is_circuit(text)
    assert parse_circuit(text) == circuit


@pytest.mark.parametrize(
    "text",
    [
        "/p2p-circuit",
        f"/p2p-circuit/p2p/{PEER}",
        "/ip4/203.0.113.5/tcp/9",
        f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}",
        f"/ip4/203.0.113.5/tcp/9/p2p-circuit/p2p/{PEER}",  # whose relay?
        f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}/p2p-circuits",
        f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}/p2p-circuit/p2p",
        f"/ip4/203.0.113.5/tcp/9/p2p/{RELAY}/p2p-circuit/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        f"/ip4/203.0.113.5/udp/9/p2p/{RELAY}/p2p-circuit",
        f"/dns/{'a.' * 200}/tcp/9/p2p/{RELAY}/p2p-circuit",
    ],
)
def test_what_is_no_address_over_a_relay_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_circuit(text)
