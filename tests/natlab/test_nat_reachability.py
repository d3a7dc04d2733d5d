"""Real peers behind the kernel's NATs know what these do, and that nobody reaches them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from meshmax.testing.fork_server import ForkServer
from meshmax.testing.process import until
from tests.natlab.lab import open_lab, why_not
from tests.natlab.nat_site import NatSite, Place, open_nat_site

pytestmark = pytest.mark.natlab

EI, AD, APD, NONE = "endpoint-independent", "address-dependent", "address-and-port-dependent", "unknown"
# State, UDP, mapping, filtering, TCP mapping
KNOWN: dict[Place, tuple[str, ...]] = {
    "public": ("public", "open", EI, EI, EI),
    "full": ("private", "open", EI, EI, EI),
    "addr": ("private", "open", EI, AD, EI),
    "port": ("private", "open", EI, APD, EI),
    "reject": ("private", "open", EI, APD, EI),
    "sym": ("private", "open", APD, APD, APD),
    "noudp": ("private", "blocked", NONE, NONE, EI),
    "corp": ("private", "blocked", NONE, NONE, NONE),
}
PAIRS: tuple[tuple[Place, Place], ...] = (("public", "full"), ("addr", "port"), ("sym", "noudp"), ("reject", "corp"))


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab, open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks) as site:
        yield site


def known(site: NatSite, name: str) -> tuple[str, ...]:
    where: dict[str, Any] = site.get(name, "/api/v1/status")["reachability"]
    nat = where["nat"]
    return where["state"], nat["udp"], nat["mapping"], nat["filtering"], nat["tcp_mapping"]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_each_kind_of_nat_is_told(site: NatSite, pair: tuple[Place, Place]) -> None:
    for name, place in zip(site.pair(*pair), pair, strict=True):
        try:  # on a busy machine one observer may be late, and is asked again
            until(f"{name} knows it", lambda name=name, place=place: known(site, name) == KNOWN[place], 60.0)  # type: ignore[misc]
        except AssertionError:
            assert known(site, name) == KNOWN[place], site.get(name, "/api/v1/status")["reachability"]


def external(site: NatSite, name: str) -> list[str]:
    found: list[str] = site.get(name, "/api/v1/status")["reachability"]["external_ips"]
    return found


def test_another_address_of_the_router_and_another_network_are_noticed(site: NatSite) -> None:
    one, two = site.pair("port", "addr")
    site.until_path(one, two, "direct", "punched-tcp", "punched-udp")
    until(f"{one} knows its address", lambda: external(site, one) == [site.routers[0].ip], 60.0)
    began_s = time.monotonic()
    site.routers[0].rebind(11)
    until(f"{one} knows its new address", lambda: external(site, one) == [site.routers[0].ip], 90.0)
    print(f"another address of the router was known after {time.monotonic() - began_s:.1f} s")
    other = site.internet.router("other", 30, "sym")
    other.take(site.hosts[one])
    began_s = time.monotonic()
    until(f"{one} knows where it is", lambda: external(site, one) == [other.ip], 90.0)
    until(f"{one} knows what this NAT does", lambda: known(site, one) == KNOWN["sym"], 60.0)
    print(f"another network was known after {time.monotonic() - began_s:.1f} s")
