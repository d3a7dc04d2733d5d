"""Real peers have a real router daemon forward their ports, and are reached so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshmax.testing.fork_server import ForkServer
from meshmax.testing.process import until
from tests.natlab.igd import forwarded, open_igd, why_no_igd
from tests.natlab.lab import open_lab, why_not
from tests.natlab.nat_site import NatSite, open_nat_site

pytestmark = pytest.mark.natlab


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not() or why_no_igd():
        pytest.skip(reason)
    with open_lab() as lab, open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks) as site:
        yield site


@pytest.mark.parametrize("by", ["nat-pmp", "upnp"])
def test_a_mapped_peer_is_reached_from_behind_any_nat_and_gives_its_ports_back(site: NatSite, by: str) -> None:
    router = site.routers[0].host
    with open_igd(router, site.folder, natpmp=by == "nat-pmp"):
        left, right = site.pair("sym", "sym")  # neither can be punched through
        until("three ports are forwarded", lambda: len(forwarded(router)) == 3, 60.0)
        where = until(
            "others reached it so",
            lambda: (known := site.get(left, "/api/v1/status")["reachability"])["state"] == "mapped" and known,
        )
        assert {each["by"] for each in where["mappings"]} == {by}
        assert {each["protocol"] for each in where["mappings"]} == {"tcp", "udp"}
        site.until_path(right, left, "direct", "mapped", within_s=60.0)
        site.stop(left, right)
        assert forwarded(router) == set()


def test_two_peers_behind_one_router_have_different_ports_outside(site: NatSite) -> None:
    router = site.routers[0].host
    with open_igd(router, site.folder, natpmp=False):
        left, right = site.pair("port", "public")
        second = site.internet.lab.host("second")
        site.routers[0].switch.plug(second, "10.10.0.12/24")
        second.ip("route add default via 10.10.0.1")
        site.found_mesh("second")
        site.start(second)
        until("six ports are forwarded", lambda: len(forwarded(router)) == 6, 60.0)
        outside = [
            each["external"]
            for name in (left, "second")
            for each in site.get(name, "/api/v1/status")["reachability"]["mappings"]
        ]
        assert len(set(outside)) >= 4  # of TCP: the control port and lanes of both
        site.stop(left, right, "second")


def test_where_no_router_maps_nothing_waits_for_it(site: NatSite) -> None:
    left, right = site.pair("full", "public")
    site.until_path(right, left, "punched-tcp", "punched-udp", "direct", within_s=60.0)
    assert site.get(left, "/api/v1/status")["reachability"]["mappings"] == []
