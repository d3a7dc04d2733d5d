"""Networks by their subnets, and those that let no UDP out."""

from __future__ import annotations

import pytest

from meshmax.core.networks import MAX_NETWORKS, REMEMBER_S, BlockedNetworks, network_of


@pytest.mark.parametrize(
    ("ips", "network"),
    [
        ((), ""),
        (("127.0.0.1", "::1", "fe80::1%eth0", "169.254.3.4", "none"), ""),
        (("192.168.1.7",), "192.168.1.0/24"),
        (("192.168.1.7", "10.0.0.3", "192.168.1.9", "2a00::1"), "10.0.0.0/24 192.168.1.0/24"),
        (("2a00:1:2:3::4", "2a00:1:2:3:ffff::5"), "2a00:1:2:3::/64"),
    ],
)
def test_a_network_is_known_by_its_subnets(ips: tuple[str, ...], network: str) -> None:
    assert network_of(ips) == network


def test_a_blocked_network_is_remembered_and_forgotten_when_it_opens() -> None:
    blocked = BlockedNetworks()
    assert not blocked.has("a", 0.0)
    assert blocked.note("a", True, 100.0)
    assert blocked.has("a", 200.0)
    assert not blocked.note("a", True, 200.0)  # nothing that is worth a file
    assert blocked.note("a", False, 300.0)
    assert not blocked.has("a", 300.0)
    assert not blocked.note("a", False, 400.0)


def test_it_counts_for_a_month_and_not_before_it_was_seen() -> None:
    blocked = BlockedNetworks({"a": 1000.0})
    assert blocked.has("a", 1000.0 + REMEMBER_S - 1)
    assert not blocked.has("a", 1000.0 + REMEMBER_S)
    assert not blocked.has("a", 999.0)


def test_no_network_at_all_is_not_remembered() -> None:
    blocked = BlockedNetworks()
    assert not blocked.note("", True, 1.0)
    assert not blocked.has("", 1.0)


def test_the_oldest_make_way() -> None:
    blocked = BlockedNetworks()
    for number in range(MAX_NETWORKS + 3):
        blocked.note(str(number), True, float(number))
    assert len(blocked.seen) == MAX_NETWORKS
    assert not blocked.has("2", 100.0)
    assert blocked.has("3", 100.0)
