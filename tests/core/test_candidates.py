"""Which candidates are believed, and that nobody is made to knock at a stranger's door."""

import ipaddress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.traversal import Candidate
from meshmax.core.candidates import MAX_TARGETS, Screen, is_private, try_ip
from meshmax.wire import sdp

PEER, OURS, STRANGER = "198.51.100.7", "203.0.113.9", "203.0.113.200"
SCREEN = Screen(
    lambda ip: ip == PEER,
    connected=frozenset({"198.51.100.8"}),
    subnets=("192.168.1.0/24",),
    own=frozenset({"192.168.1.5"}),
    external=frozenset({OURS}),
    relays=frozenset({"198.51.100.99"}),
)
SAME_SITE = Screen(
    lambda ip: ip == OURS, subnets=("192.168.1.0/24",), own=frozenset({"192.168.1.5"}), external=frozenset({OURS})
)
ISOLATED = Screen(lambda ip: False, subnets=("192.168.1.0/24", "fd00:1::/64"), own=frozenset({"192.168.1.5"}))


def at(ip: str, port: int = 40_000, kind: str = "srflx") -> Candidate:
    return Candidate(kind, "tcp", ip, port)  # type: ignore[arg-type]


@pytest.mark.parametrize("screen", [SCREEN, SAME_SITE, ISOLATED])
@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.1.1", "224.0.0.251", "239.255.255.250", "255.255.255.255",
        "240.0.0.1", "192.0.0.1", "192.88.99.1", "::", "::1", "fe80::1", "ff02::fb", "::ffff:127.0.0.1",
        "::ffff:198.51.100.7", "64:ff9b::7f00:1", "2002:7f00:1::1", "2001:0:1::1", "::198.51.100.7",
        "192.168.1.5", "192.168.1.255", "192.168.1.0",
        STRANGER, "8.8.8.8", "2600::1",
        "localhost", "example.org", "0", "1", "2130706433", "0x7f000001", "127.1", "198.51.100.07", "198.51.100.7 ",
        "fe80::1%eth0", "192.168.1.6%eth0", "", "10.0.0.0/8", "٣.1.1.1",
    ],
)  # fmt: skip
def test_what_is_nobodys_ours_or_a_strangers_gets_no_packet(screen: Screen, ip: str) -> None:
    believing = Screen(lambda _: True, subnets=screen.subnets, own=screen.own, external=screen.external)
    assert not screen.allows(at(ip))
    if ip not in (STRANGER, "8.8.8.8", "2600::1"):
        assert not believing.allows(at(ip)), "whoever vouches"


def test_a_public_address_counts_where_somebody_vouched_or_the_peer_comes_from_there() -> None:
    assert SCREEN.allows(at(PEER))
    assert SCREEN.allows(at("198.51.100.8"))
    assert not SCREEN.allows(at(STRANGER))


@pytest.mark.parametrize(("port", "allowed"), [(80, True), (443, True), (22, False), (1023, False), (1024, True)])
def test_ports_of_system_services_get_no_packet(port: int, allowed: bool) -> None:
    assert SCREEN.allows(at(PEER, port)) is allowed


def test_a_private_address_counts_only_in_the_network_that_both_are_in() -> None:
    assert not SCREEN.allows(at("192.168.1.6")), "the peer is elsewhere: many networks have this address"
    assert SAME_SITE.allows(at("192.168.1.6"))
    assert SAME_SITE.allows(at("10.4.0.1")), "behind one external address"
    assert ISOLATED.allows(at("192.168.1.6"))
    assert ISOLATED.allows(at("fd00:1::7"))
    assert not ISOLATED.allows(at("10.4.0.1"))
    assert not ISOLATED.allows(at("100.64.0.1"))


def test_an_address_at_a_turn_server_counts_where_we_use_that_server_ourselves() -> None:
    assert SCREEN.allows(at("198.51.100.99", kind="relay"))
    assert not SCREEN.allows(at("198.51.100.98", kind="relay"))
    assert not SCREEN.allows(at(PEER, kind="relay"))
    assert not SCREEN.allows(at("198.51.100.99", kind="srflx"))


def test_targets_are_each_address_once_and_no_more_than_their_bound() -> None:
    many = [at(PEER, 40_000 + number // 2) for number in range(6 * MAX_TARGETS)]
    targets = SCREEN.targets(many)
    assert len(targets) == len(set(targets)) == MAX_TARGETS
    assert SCREEN.targets([Candidate("host", "udp", PEER, 40_000), at(STRANGER)]) == ()


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(["host", "srflx", "relay"]))
def test_no_address_counts_for_who_has_neither_voucher_nor_network_in_common(
    ip: ipaddress.IPv4Address, port: int, kind: str
) -> None:
    elsewhere = Screen(lambda _: False, subnets=("192.168.1.0/24",), external=frozenset({OURS}))
    assert not elsewhere.allows(at(str(ip), port, kind))


@given(st.text(max_size=50))
def test_what_is_no_address_is_none_and_never_raises(text: str) -> None:
    address = try_ip(text)
    assert address is None or str(address)
    assert is_private(text) in (True, False)


DESCRIPTION = sdp.Description("ufra", "p" * 22, ":".join(["AB"] * 32), "actpass")


def described(*ips: str) -> str:
    candidates = tuple(sdp.IceCandidate("srflx", ip, 40_000, 100, "1") for ip in ips)
    return sdp.encode(msgspec.structs.replace(DESCRIPTION, candidates=candidates), 7)


def test_of_an_sdp_the_allowed_candidates_are_left_and_what_authenticates_it() -> None:
    screened = sdp.decode(SCREEN.sdp(described("127.0.0.1", PEER, STRANGER, "192.168.1.6")))
    assert [each.ip for each in screened.candidates] == [PEER]
    assert screened.fingerprint == DESCRIPTION.fingerprint
    assert screened.ufrag == "ufra"


@pytest.mark.parametrize(
    "line",
    [
        f"c=IN IP4 {STRANGER}",
        f"a=rtcp:9 IN IP4 {STRANGER}",
        f"a=remote-candidates:1 {STRANGER} 4000",
        f"a=candidate:1 1 tcp 100 {STRANGER} 9 typ host tcptype active",
        f"a=candidate:1 2 udp 100 {STRANGER} 4000 typ host",
        "a=candidate:1 1 udp 100 printer.local 4000 typ host",
        f"a=candidate:1 1 udp 100 {PEER} 4000 typ srflx raddr {STRANGER} rport 4000",
        f"a=ice-options:{STRANGER}",
    ],
)
def test_whatever_else_an_sdp_names_reaches_nobody(line: str) -> None:
    screened = SCREEN.sdp(described(PEER) + line + "\r\n")
    assert STRANGER not in screened
    assert "printer" not in screened


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v=0",
        "x" * 9000,
        described(PEER).replace("sha-256", "sha-1"),
        described(PEER).replace("a=ice-pwd", "a=ice-pwx"),
        described(PEER) + "a=ice-ufrag:zzzz\r\n",
        described(*([PEER] * 16)) + f"a=candidate:9 1 udp 100 {PEER} 4000 typ host\r\n",
        described(PEER).replace("ufra", "ufrä"),
    ],
)
def test_an_sdp_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        SCREEN.sdp(text)
