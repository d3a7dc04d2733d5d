"""Threads that trio keeps work where they are asked for, not where they began."""

import os
from pathlib import Path

import pytest
import trio

from tests.natlab.lab import Lab

pytestmark = pytest.mark.natlab


async def _of_a_thread() -> str:
    return await trio.to_thread.run_sync(os.readlink, "/proc/thread-self/ns/net")


def test_a_kept_thread_works_in_the_namespace_of_who_asks(lab: Lab) -> None:
    _, (host,) = lab.lan("one")
    here = str(Path("/proc/thread-self/ns/net").readlink())
    with host.inside():
        there = str(Path("/proc/thread-self/ns/net").readlink())
        assert trio.run(_of_a_thread) == there
    assert there != here
    assert trio.run(_of_a_thread) == here
    with host.inside():
        assert trio.run(_of_a_thread) == there
