"""Peers behind NATs of all kinds meet: directly wherever that is possible, over a relay elsewhere; prompts cross every path.

The whole matrix, with how fast and how soon, is scripts/bench_nat's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from meshmax.testing.fork_server import ForkServer
from tests.loopback.transfer_site import random_model
from tests.natlab.lab import open_lab, why_not
from tests.natlab.nat_pair import DIRECT, measure, possible_directly
from tests.natlab.nat_site import NatSite, Place, open_nat_site

pytestmark = pytest.mark.natlab
PAIRS: tuple[tuple[Place, Place], ...] = (
    ("port", "port"),
    ("sym", "full"),
    ("sym", "sym"),
    ("noudp", "noudp"),
    ("port", "sym"),
    ("corp", "public"),
    ("corp", "sym"),
    ("full", "addr"),
    ("public", "port"),
    ("nosyn", "nosyn"),
)


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab, open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks) as site:
        yield site


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_a_pair_meets_by_the_best_way_that_there_is(site: NatSite, left: Place, right: Place) -> None:
    # Over relays blobs go slowly, so one pair does for all.
    pair = measure(site, left, right, _model(site, 8), _model(site, 1) if left == right else None)
    print(pair)
    assert pair.path, f"{left} and {right} did not meet\n{site.tails()}"
    assert pair.answered_by == site.ids[[*site.peers][1]]
    assert pair.pulled_mb_per_s or (pair.path == "relay" and left != right), f"{pair}\n{site.tails()}"
    if left == "nosyn":
        assert pair.path == pair.back == "punched-udp"
    assert {pair.path, pair.back} <= (set(DIRECT) if possible_directly(left, right) else {"relay"}), (
        f"{pair}\n{site.tails()}"
    )


def _model(site: NatSite, chunks: int) -> Path:
    folder = site.folder / f"{chunks}-chunks"
    if not folder.exists():
        folder.mkdir()
        random_model(folder, chunks)
    return folder / "model.gguf"
