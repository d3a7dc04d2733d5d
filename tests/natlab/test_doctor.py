"""The doctor, on machines whose networks are broken in the ways that people's networks are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.natlab.lab import Host, Lab
from tests.natlab.site import Site

pytestmark = pytest.mark.natlab


def findings(site: Site, name: str) -> dict[str, Any]:
    """What a visit finds, by its code; that all is well must mean that nothing is wrong."""
    diagnosis = site.call(name, "GET", "/api/v1/doctor", timeout_s=60.0).json()
    found = {finding["code"]: finding for finding in diagnosis["findings"]}
    assert diagnosis["well"] == all(finding["severity"] == "ok" for finding in found.values())
    return found


@contextmanager
def dropping(host: Host, packets: str) -> Iterator[None]:
    """A firewall that lets such packets not in."""
    host.rules(f"""
        table inet lab-firewall {{
            chain input {{
                type filter hook input priority filter; policy accept
                {packets} drop
            }}
        }}""")
    yield
    host.run("nft", "delete", "table", "inet", "lab-firewall")


def test_the_doctor_says_which_machine_lets_no_mdns_in(lab: Lab, site: Site) -> None:
    _, (here, there) = lab.lan("here", "there")
    with dropping(there, "udp dport 5353"):
        site.start(here)
        site.start(there)
        site.until_met()
        assert "UDP 5353 is blocked at there" in findings(site, "here")["mdns_one_way_there"]["sentence"]
        assert "UDP 5353 is blocked at this machine" in findings(site, "there")["mdns_one_way_here"]["sentence"]


def test_the_doctor_says_what_is_wrong_with_a_network_and_that_it_is_well_again(lab: Lab, site: Site) -> None:
    _, (here, there) = lab.lan("here", "there")
    site.start(here, there)
    site.until_met()
    here.forbid_multicast()
    assert "firewall" in findings(site, "here")["mdns_failing"]["sentence"]
    here.allow_multicast()
    with dropping(here, "tcp dport 11435 tcp flags syn / syn,ack"):
        assert "TCP port 11435" in findings(site, "here")["port_unreachable"]["sentence"]
    assert not {"mdns_failing", "port_unreachable"} & findings(site, "here").keys()
