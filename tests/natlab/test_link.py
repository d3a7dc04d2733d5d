"""A network that drops and comes back in the middle of a pull."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from meshmax.testing.fork_server import PROGRAM, ForkServer
from meshmax.testing.process import Process
from tests.loopback.test_transfer_faults import IN_FLIGHT
from tests.loopback.transfer_site import Mesh, calm, ending, random_model
from tests.natlab.lab import Lab

pytestmark = pytest.mark.natlab
NAMES = ("fetcher", "source")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class CableMesh(Mesh):
    """A fetcher and a source at the ends of a cable."""

    def __init__(self, folder: Path, lab: Lab, forks: ForkServer) -> None:
        super().__init__(folder, forks, NAMES)
        self.ends = [lab.host(name) for name in NAMES]
        first, second = (f"{address}/24" for address in ADDRESSES)
        lab.cable(self.ends[0], first, self.ends[1], second)

    def ip(self, name: str) -> str:
        return ADDRESSES[NAMES.index(name)]

    def inside(self, name: str) -> AbstractContextManager[None]:
        return self.ends[NAMES.index(name)].inside()

    def spawn(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> Process:
        assert self.forks is not None
        host = self.ends[NAMES.index(env["MESHMAX_NAME"])]
        return self.forks.start(arguments, env, log, PROGRAM, host.path)


@pytest.mark.parametrize("down_at", [0, 1])
def test_a_pull_goes_on_after_the_network_was_gone_for_eight_seconds(
    tmp_path: Path, lab: Lab, forks: ForkServer, down_at: int
) -> None:
    path, digest = random_model(tmp_path, 60)
    site = CableMesh(tmp_path, lab, forks)
    with ending(site):
        site.start(*NAMES)
        site.meet(*NAMES)
        site.add("source", path=path)
        site.limit("source", "15MB/s")
        site.pull("fetcher")
        site.until_share("fetcher", 0.3)
        site.ends[down_at].link("cable", "down")
        time.sleep(8.0)
        site.ends[down_at].link("cable", "up")
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
