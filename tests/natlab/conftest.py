"""A laboratory for each test, and peers that begin in a moment."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from meshmax.testing.fork_server import ForkServer, open_fork_server
from tests.natlab.lab import Lab, open_lab, why_not
from tests.natlab.site import Site, open_site

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture
def lab() -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("forked processes are watched through pidfd, so Linux only")
    if reason := why_not():
        pytest.skip(reason)
    with open_fork_server() as server:
        yield server


@pytest.fixture
def site(lab: Lab, forks: ForkServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    # Three times the usual pace, so that a peer is known to be gone after 2 s; scripts/bench_lan measures the usual one.
    with open_site(tmp_path, forks, heartbeat_s="0.7", heartbeat_timeout_s="2.0") as site:
        yield site
        if request.node.stash.get(FAILED, False):
            print(site.tails())
