"""Real peers behind the kernel's NATs know what these do, and that nobody reaches them."""

from __future__ import annotations

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
        until(f"{name} knows where it stands", lambda name=name: known(site, name)[0] != "unknown", 20)  # type: ignore[misc]
        assert known(site, name) == KNOWN[place], site.get(name, "/api/v1/status")["reachability"]
