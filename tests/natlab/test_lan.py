"""Peers on one LAN, each on a machine of its own: they meet, and meet again whatever happened to the network."""

from __future__ import annotations

import time

import pytest

from tests.natlab.lab import Lab
from tests.natlab.site import Site, median

pytestmark = pytest.mark.natlab
NAMES = ("one", "two", "three", "four", "five")


def test_five_peers_on_one_lan_see_each_other(lab: Lab, site: Site) -> None:
    _, hosts = lab.lan(*NAMES)
    site.start(*hosts)
    pairs = site.until_pairs(*NAMES, within_s=10.0)
    print(f"pairs: median {median(pairs):.2f} s, last {max(pairs.values()):.2f} s after the last API was up")


@pytest.mark.parametrize(("fail", "mend"), [("cut", "restore"), ("stall", "resume")])
@pytest.mark.parametrize("out_s", [3.0, 12.0])
def test_they_meet_again_after_the_lan_was_gone(lab: Lab, site: Site, fail: str, mend: str, out_s: float) -> None:
    switch, hosts = lab.lan(*NAMES)
    site.start(*hosts)
    site.until_met(*NAMES)
    getattr(switch, fail)()
    gone_s = time.monotonic()
    if out_s > 6.0:
        site.until_parted(*NAMES)
    time.sleep(max(0.0, out_s - (time.monotonic() - gone_s)))
    getattr(switch, mend)()
    pairs = site.until_pairs(*NAMES, within_s=30.0)
    print(f"{fail} for {out_s} s: pairs: median {median(pairs):.2f} s, last {max(pairs.values()):.2f} s")
