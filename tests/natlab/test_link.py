"""A network that drops and comes back in the middle of a pull."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from meshmax.testing.process import Process, spawn
from tests.loopback.test_transfer_faults import IN_FLIGHT
from tests.loopback.transfer_site import Mesh, calm, ending, random_model
from tests.natlab.cable import ADDRESSES, Cable, lay_cable

pytestmark = [
    pytest.mark.natlab,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces take root and iproute2"),
]
NAMES = ("fetcher", "source")


@pytest.fixture
def cable() -> Iterator[Cable]:
    try:
        with lay_cable() as cable:
            yield cable
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr}")


class CableMesh(Mesh):
    """A fetcher and a source at the ends of a cable."""

    def __init__(self, folder: Path, cable: Cable) -> None:
        super().__init__(folder, None, NAMES)  # a forked peer would be where its server is
        self.cable = cable

    def ip(self, name: str) -> str:
        return ADDRESSES[NAMES.index(name)]

    def inside(self, name: str) -> AbstractContextManager[None]:
        return self.cable.inside(NAMES.index(name))

    def spawn(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> Process:
        return spawn(arguments, env, log)


@pytest.mark.parametrize("down_at", [0, 1])
def test_a_pull_goes_on_after_the_network_was_gone_for_eight_seconds(
    tmp_path: Path, cable: Cable, down_at: int
) -> None:
    path, digest = random_model(tmp_path, 60)
    with ending(CableMesh(tmp_path, cable)) as site:
        site.start(*NAMES)
        site.meet(*NAMES)
        site.add("source", path=path)
        site.limit("source", "15MB/s")
        site.pull("fetcher")
        site.until_share("fetcher", 0.3)
        cable.link(down_at, "down")
        time.sleep(8.0)
        cable.link(down_at, "up")
        up_s = time.monotonic()
        before = calm(lambda: site.transfer("fetcher")["bytes_done"], still_s=0.0)
        last = site.until_done("fetcher", 25)
        assert site.holds("fetcher", digest)
        sent = calm(lambda: site.moved("source", "out"))
        print(
            f"{before / last['bytes_total']:.0%} were there; done {time.monotonic() - up_s:.1f} s after the link was up, "
            f"{(sent - last['bytes_total']) / 2**20:.1f} chunks sent again"
        )
        assert sent <= last["bytes_total"] + IN_FLIGHT
