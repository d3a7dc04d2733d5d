"""Peers of this tier are forked from a server, which saves seconds of importing for each, but where the start itself is tried."""

import os
from collections.abc import Iterator

import pytest

from meshmax.testing.fork_server import ForkServer, open_fork_server
from meshmax.testing.process import usually_spawned_by

AS_A_PERSON_DOES = {"test_cli_peer", "test_cli_demo", "test_bootstrap", "test_clients"}  # and exit codes are looked at


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("forked processes are watched through pidfd, so Linux only")
    with open_fork_server() as server:
        yield server


@pytest.fixture(autouse=True, scope="module")
def quick_starts(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.rpartition(".")[2] in AS_A_PERSON_DOES or not hasattr(os, "pidfd_open"):
        yield
        return
    with usually_spawned_by(request.getfixturevalue("forks").start):
        yield
