"""mDNS on real interfaces: refused, starved and moved about, it says what is wrong, and recovers by itself."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from meshmax.net import mdns
from meshmax.net.addresses import interface_addresses, multiaddr_of
from meshmax.net.mdns import NO_LAN, Mdns
from meshmax.ports import Sighting
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.process import until
from tests.natlab.lab import Host, Lab

pytestmark = pytest.mark.natlab
PORT = 11435
WITHIN_S = 60.0  # generous: it is a matter of a second or two


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "CHECK_INTERVAL_S", 0.3)
    monkeypatch.setattr(mdns, "RETRY_S", (0.2, 0.5))
    monkeypatch.setattr(mdns, "REPEAT_S", 0.5)


class Rung:
    """mDNS alone, on a host: in a thread that is there."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.peer_id = SeededSigner(secrets.randbits(200)).peer_id
        self.mdns = Mdns(self.peer_id, self._addresses, ())
        self.sightings: list[Sighting] = []
        self.stop: Callable[[], Any] = lambda: None
        self.thread = threading.Thread(target=self._run, name=host.name)

    def _addresses(self) -> tuple[str, ...]:
        return tuple(multiaddr_of(ip.partition("%")[0], PORT, self.peer_id) for ip in interface_addresses())

    def _run(self) -> None:
        with self.host.inside():
            trio.run(self._main)

    async def _main(self) -> None:
        token = trio.lowlevel.current_trio_token()
        sink, source = trio.open_memory_channel[Sighting](100)
        async with trio.open_nursery() as nursery:
            self.stop = lambda: token.run_sync_soon(nursery.cancel_scope.cancel)
            nursery.start_soon(self.mdns.run, sink)
            async for sighting in source:
                self.sightings.append(sighting)

    def hears(self, other: Rung, address: str = "") -> bool:
        """Whether it heard of the other one (at that address) since `forget`."""
        return any(s.peer_id == other.peer_id and address in "".join(s.addresses) for s in self.sightings)

    def until_hears(self, other: Rung, address: str = "") -> None:
        until(f"{self.host.name} hears {other.host.name}", lambda: self.hears(other, address), WITHIN_S)

    def until_problem(self, words: str) -> None:
        """Until its problem says that; '' for none."""
        until(
            f"{self.host.name}'s problem is '{words}'",
            lambda: words in self.mdns.problem if words else not self.mdns.problem,
            WITHIN_S,
        )

    def forget(self) -> None:
        self.sightings.clear()


@contextmanager
def running(*hosts: Host) -> Iterator[list[Rung]]:
    rungs = [Rung(host) for host in hosts]
    for rung in rungs:
        rung.thread.start()
    try:
        yield rungs
    finally:
        for rung in rungs:
            rung.stop()
        for rung in rungs:
            rung.thread.join(10)


def meet_anew(one: Rung, two: Rung) -> None:
    one.forget()
    two.forget()
    one.until_hears(two)
    two.until_hears(one)


def test_multicast_that_the_system_refuses_is_a_problem_until_it_is_allowed(lab: Lab) -> None:
    _, hosts = lab.lan("one", "two")
    hosts[0].forbid_multicast()
    with running(*hosts) as (one, two):
        one.until_problem("firewall")
        assert "eth0 (10.77.0.1)" in one.mdns.problem
        two.until_problem("")
        hosts[0].allow_multicast()
        one.until_problem("")
        meet_anew(one, two)
        hosts[0].forbid_multicast()
        one.until_problem("firewall")


def test_a_program_that_holds_the_port_is_named_as_the_problem_until_it_ends(lab: Lab) -> None:
    _, hosts = lab.lan("one", "two")
    with hosts[0].inside():
        selfish = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        selfish.bind(("0.0.0.0", 5353))
    with running(*hosts) as (one, two):
        with selfish:
            one.until_problem("held by another program")
        one.until_problem("")
        meet_anew(one, two)


@pytest.mark.parametrize("whose", ["own", "switch"])
def test_a_link_that_goes_down_and_comes_up_is_followed(lab: Lab, whose: str) -> None:
    _, hosts = lab.lan("one", "two")
    switch = hosts[0].link if whose == "own" else hosts[0].cable
    with running(*hosts) as (one, two):
        meet_anew(one, two)
        for _ in range(2):
            switch("eth0", "down")
            one.until_problem(NO_LAN)
            switch("eth0", "up")
            one.until_problem("")
            meet_anew(one, two)


def test_an_interface_that_is_pulled_out_and_put_in_again_is_followed(lab: Lab) -> None:
    switch, hosts = lab.lan("one", "two")
    with running(*hosts) as (one, two):
        meet_anew(one, two)
        hosts[0].unplug("eth0")
        one.until_problem(NO_LAN)
        switch.plug(hosts[0], "10.77.0.1/24", interface="eth0")
        one.until_problem("")
        meet_anew(one, two)


def test_an_interface_that_comes_later_is_used(lab: Lab) -> None:
    switch, (there,) = lab.lan("there")
    late = lab.host("late")
    with running(there, late) as (one, two):
        two.until_problem(NO_LAN)
        switch.plug(late, "10.77.0.9/24")
        two.until_problem("")
        one.until_hears(two, "10.77.0.9")
        two.until_hears(one)


def test_a_changed_address_is_told(lab: Lab) -> None:
    _, hosts = lab.lan("one", "two")
    with running(*hosts) as (one, two):
        one.until_hears(two, "10.77.0.2")
        hosts[1].address("del", "10.77.0.2/24")
        hosts[1].address("add", "10.77.0.77/24")
        one.forget()
        one.until_hears(two, "10.77.0.77")
        meet_anew(one, two)
        assert not two.mdns.problem


def test_an_interface_that_refuses_costs_the_other_one_nothing(lab: Lab) -> None:
    _, (middle, left) = lab.lan("middle", "left")
    other, (right,) = lab.lan("right", prefix="10.78.0")
    other.plug(middle, "10.78.0.9/24")
    middle.rules("""
        table inet lab-half {
            chain output {
                type filter hook output priority filter; policy accept
                oifname "eth1" udp dport 5353 drop
            }
        }""")
    with running(middle, left, right) as (one, two, three):
        one.until_problem("eth1 (10.78.0.9)")
        meet_anew(one, two)
        middle.run("nft", "delete", "table", "inet", "lab-half")
        one.until_problem("")
        meet_anew(one, three)


@pytest.mark.parametrize("address", ["fd77::%d/64", ""])
def test_ipv6_alone_will_do(lab: Lab, address: str) -> None:
    switch = lab.switch()
    hosts = [lab.host("one"), lab.host("two")]
    for number, host in enumerate(hosts, 1):
        switch.plug(host, *([address % number] if address else []))
    with running(*hosts) as (one, two):
        one.until_hears(two, "fd77::2" if address else "/ip6zone/eth0/ip6/fe80::")
        two.until_hears(one)
        assert not one.mdns.problem


def test_who_has_only_a_link_local_address_is_heard_by_those_with_more(lab: Lab) -> None:
    switch, (usual,) = lab.lan("usual")
    bare = lab.host("bare")
    switch.plug(bare)
    with running(usual, bare) as (one, two):
        one.until_hears(two, "/ip6zone/eth0/ip6/fe80::")
        two.until_hears(one, "/ip4/10.77.0.1/")
