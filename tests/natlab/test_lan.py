"""Peers on one LAN, each on a machine of its own: they meet, and meet again whatever happened to the network."""

from __future__ import annotations

import time

import pytest

from meshmax.testing.process import until
from tests.natlab.lab import Lab
from tests.natlab.site import Site, median

pytestmark = pytest.mark.natlab
NAMES = ("one", "two", "three", "four", "five")


def test_five_peers_on_one_lan_see_each_other(lab: Lab, site: Site) -> None:
    _, hosts = lab.lan(*NAMES)
    site.start(*hosts)
    pairs = site.until_pairs(*NAMES, within_s=60.0)
    print(f"pairs: median {median(pairs):.2f} s, last {max(pairs.values()):.2f} s after the last API was up")


@pytest.mark.parametrize(("fail", "mend"), [("cut", "restore"), ("stall", "resume")])
def test_five_peers_meet_again_after_the_lan_was_gone(lab: Lab, site: Site, fail: str, mend: str) -> None:
    switch, hosts = lab.lan(*NAMES)
    site.start(*hosts)
    site.until_met(*NAMES)
    getattr(switch, fail)()
    site.until_parted(*NAMES)
    time.sleep(2.0)
    getattr(switch, mend)()
    pairs = site.until_pairs(*NAMES, within_s=60.0)
    print(f"pairs: median {median(pairs):.2f} s, last {max(pairs.values()):.2f} s after the network's return")


def test_where_multicast_is_blocked_one_known_address_brings_all_together(lab: Lab, site: Site) -> None:
    switch, hosts = lab.lan(*NAMES)
    switch.block_multicast()
    first, *others = hosts
    site.start(first)
    site.start(*others, join=site.address("one", "10.77.0.1"))
    print(f"all met {site.until_met(*NAMES):.2f} s after the last API was up")


def test_where_multicast_is_blocked_a_peer_finds_its_old_neighbours_by_itself(lab: Lab, site: Site) -> None:
    switch, (one, two, three) = lab.lan("one", "two", "three")
    site.start(one, two, three)
    site.until_met()
    until("neighbours are written down", (site.folder / "three" / "peers.json").exists, 60.0)
    site.stop("three")
    switch.block_multicast()
    site.start(three)
    site.until_met("one", "two", "three", within_s=60.0)


def test_a_peer_whose_interface_comes_later_is_found(lab: Lab, site: Site) -> None:
    switch, (there,) = lab.lan("there")
    late = lab.host("late")
    site.start(there, late)
    switch.plug(late, "10.77.0.9/24")
    print(f"met {site.until_met('there', 'late'):.2f} s after it came")


def test_a_peer_that_changes_its_address_is_found_again(lab: Lab, site: Site) -> None:
    _, (stays, moves) = lab.lan("stays", "moves")
    site.start(stays, moves)
    site.until_met()
    moves.address("del", "10.77.0.2/24")
    moves.address("add", "10.77.0.222/24")
    began_s = time.monotonic()
    until("its new address is used", lambda: "10.77.0.222" in site.where("stays", "moves"), 60.0)
    site.until_met("stays", "moves")
    print(f"met at the new address {time.monotonic() - began_s:.2f} s after it changed")


def test_a_peer_whose_interface_is_pulled_out_and_put_in_again_is_found_again(lab: Lab, site: Site) -> None:
    switch, (stays, leaves) = lab.lan("stays", "leaves")
    site.start(stays, leaves)
    site.until_met()
    leaves.unplug("eth0")
    site.until_parted("stays", "leaves")
    switch.plug(leaves, "10.77.0.2/24", interface="eth0")
    print(f"met {site.until_met('stays', 'leaves'):.2f} s after it was back")


@pytest.mark.parametrize("address", ["fd77::%d/64", ""])
def test_peers_meet_over_ipv6_alone(lab: Lab, site: Site, address: str) -> None:
    switch = lab.switch()
    hosts = [lab.host("one"), lab.host("two")]
    for number, host in enumerate(hosts, 1):
        switch.plug(host, *([address % number] if address else []))
    site.start(*hosts)
    site.until_met("one", "two")
    assert ("fd77::" if address else "fe80::") in site.where("one", "two")


def test_a_peer_with_only_a_link_local_address_is_found_by_those_with_more(lab: Lab, site: Site) -> None:
    switch, (usual,) = lab.lan("usual")
    bare = lab.host("bare")
    switch.plug(bare)
    site.start(usual, bare)
    site.until_met("usual", "bare")


def test_a_peer_with_two_interfaces_is_found_on_both(lab: Lab, site: Site) -> None:
    _, (middle, left) = lab.lan("middle", "left")
    other, (right,) = lab.lan("right", prefix="10.78.0")
    other.plug(middle, "10.78.0.9/24")
    site.start(middle, left, right)
    site.until_met("middle", "left")
    site.until_met("middle", "right")
    assert "10.77.0." in site.where("middle", "left")
    assert "10.78.0." in site.where("middle", "right")
    assert not site.sees("left", "right")  # nobody routes between them


def test_three_meshes_on_one_lan_stay_apart(lab: Lab, site: Site) -> None:
    _, hosts = lab.lan("ann", "bob", "cyd", "dan", "eve")
    site.start(*hosts)
    site.until_met()
    site.make_private("ann", "bob")
    site.make_private("cyd", "dan")
    for mesh in (("ann", "bob"), ("cyd", "dan")):
        site.until_met(*mesh)
    groups = {"ann": {"bob"}, "bob": {"ann"}, "cyd": {"dan"}, "dan": {"cyd"}, "eve": set[str]()}
    until("each sees its own mesh alone", lambda: {name: site.names(name) for name in groups} == groups, 60.0)
    time.sleep(3.0)  # they go on hearing each other by mDNS
    assert {name: site.names(name) for name in groups} == groups
