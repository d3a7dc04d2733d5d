import pytest

from meshmax.base.reachability import ReachState
from meshmax.base.status import Path
from meshmax.core.told_path import told_path

MAPPED = "/ip4/203.0.113.7/tcp/40001"


@pytest.mark.parametrize("path", ["punched-tcp", "punched-udp", "relay", "mapped"])
def test_other_paths_than_direct_ones_are_told_as_they_are(path: Path) -> None:
    assert told_path(path, MAPPED, True, [MAPPED], "mapped") == path


def test_what_we_dialled_is_mapped_where_the_peer_says_so() -> None:
    assert told_path("direct", MAPPED, True, ["/ip4/203.0.113.7/tcp/1", MAPPED], "unknown") == "mapped"
    assert told_path("direct", MAPPED, True, [], "mapped") == "direct"
    assert told_path("direct", "/ip4/203.0.113.7/tcp/11435", True, [MAPPED], "mapped") == "direct"


@pytest.mark.parametrize(
    ("address", "own", "path"),
    [
        ("/ip4/203.0.113.9/tcp/5", "mapped", "mapped"),
        ("/ip6/2001:db8::9/tcp/5", "mapped", "mapped"),
        ("/ip4/203.0.113.9/tcp/5", "public", "direct"),
        ("/ip4/203.0.113.9/tcp/5", "unknown", "direct"),
        ("/ip4/192.168.1.9/tcp/5", "mapped", "direct"),
        ("/ip4/127.0.0.1/tcp/5", "mapped", "direct"),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/5", "mapped", "direct"),
        ("/ip6/fe80::1/tcp/5", "mapped", "direct"),
        ("/memory/3", "mapped", "direct"),
        ("", "mapped", "direct"),
    ],
)
def test_what_came_to_us_is_mapped_where_it_came_from_outside_through_our_mapping(
    address: str, own: ReachState, path: Path
) -> None:
    assert told_path("direct", address, False, [], own) == path
