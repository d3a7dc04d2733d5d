"""Two LANs joined only by a router: their peers meet at a bootstrap node, move models, and go on when it is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from meshmax.testing.process import until
from tests.loopback.transfer_site import random_model
from tests.natlab.lab import Host, Lab, Switch
from tests.natlab.site import Site

pytestmark = pytest.mark.natlab
NAMES = ("ann", "bob", "cyd")  # the first two on one LAN
POINT = "10.79.0.1"


def join_lans(lab: Lab) -> tuple[list[Switch], list[Host], Host]:
    """A router between a LAN of two, a LAN of one, and the LAN of a bootstrap node."""
    router = lab.host("router")
    router.forward()
    switches, hosts = [], []
    for number, names in ((77, NAMES[:2]), (78, NAMES[2:]), (79, ("point",))):
        switch, there = lab.lan(*names, prefix=f"10.{number}.0")
        switch.plug(router, f"10.{number}.0.254/24")
        for host in there:
            host.ip(f"route add default via 10.{number}.0.254")
        switches.append(switch)
        hosts += there
    *members, point = hosts
    return switches, members, point


def move_model(site: Site, folder: Path, giver: str, taker: str, name: str) -> None:
    """The taker pulls a model that the giver has just got."""
    path, digest = random_model(folder, 8)
    site.call(giver, "POST", "/api/v1/models/add", {"name": name, "path": str(path)}, timeout_s=60.0)

    def listed() -> bool:
        return any(model["name"] == f"{name}:latest" for model in site.get(taker, "/api/tags")["models"])

    until(f"{taker} hears of {name}", listed, 60.0)
    reply = site.call(taker, "POST", "/api/pull", {"model": name, "stream": False}, timeout_s=60.0)
    assert reply.json()["status"] == "success"
    assert (site.folder / taker / "models" / "blobs" / f"sha256-{digest}").exists()


@pytest.mark.parametrize(("mesh", "multicast"), [("open", "passes"), ("open", "blocked"), ("private", "blocked")])
def test_two_lans_meet_at_a_bootstrap_node_and_outlive_it(
    lab: Lab, site: Site, tmp_path: Path, mesh: str, multicast: str
) -> None:
    switches, members, point = join_lans(lab)
    if multicast == "blocked":
        for switch in switches:
            switch.block_multicast()
    site.settings["bootstrap"] = site.start_bootstrap(point, POINT)
    site.start(*members)
    if mesh == "private":
        site.make_private(*NAMES)
        site.stop(*NAMES)
        for name in NAMES:  # who joined by a ticket knows an address: that is not how they shall meet
            (site.folder / name / "peers.json").unlink(missing_ok=True)
        site.start(*members)
    print(f"met {site.until_met(*NAMES, within_s=60.0):.2f} s after the last API was up")
    assert site.online("cyd") == {site.ids["ann"], site.ids["bob"]}  # a bootstrap node is no member
    move_model(site, tmp_path, "ann", "cyd", "first")

    site.stop_bootstrap(point)
    move_model(site, tmp_path, "bob", "cyd", "second")
    site.stop("cyd")
    site.start(members[-1])
    print(f"met again without it {site.until_met(*NAMES, within_s=60.0):.2f} s after a restart")
    move_model(site, tmp_path, "cyd", "ann", "third")


@pytest.mark.parametrize("mesh", ["open", "private"])
def test_a_peer_behind_a_nat_meets_one_that_is_not_in_a_private_mesh_alone(lab: Lab, site: Site, mesh: str) -> None:
    internet, (point, office) = lab.lan("point", "office", prefix="11.22.33")
    router = lab.host("router")
    router.forward()
    internet.plug(router, "11.22.33.99/24", interface="wan")
    home, (behind,) = lab.lan("behind")
    home.plug(router, "10.77.0.254/24")
    router.masquerade("wan")
    behind.ip("route add default via 10.77.0.254")
    site.settings["bootstrap"] = site.start_bootstrap(point, "11.22.33.1")
    site.start(behind, office)
    if mesh == "private":
        site.make_private("office", "behind")
        site.until_met("behind", "office", within_s=60.0)
    else:
        time.sleep(3.0)  # the open mesh lives on private addresses alone
        assert not site.sees("behind", "office")
        assert not site.sees("office", "behind")
