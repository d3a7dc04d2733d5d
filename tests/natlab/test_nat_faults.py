"""What happens to peers behind NATs in the middle of their work: routers forget, relays die, networks change."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from meshmax.testing.fork_server import ForkServer
from meshmax.testing.process import until
from tests.loopback.transfer_site import random_model
from tests.natlab.lab import open_lab, why_not
from tests.natlab.nat_lab import NETWORK
from tests.natlab.nat_pair import DIRECT, give_model, lists
from tests.natlab.nat_site import NatSite, open_nat_site

pytestmark = pytest.mark.natlab
WORDS = " ".join(f"word{number}" for number in range(120))
SLOW = {"engine_echo_tokens_per_s": "20"}  # six seconds for WORDS


@pytest.fixture(scope="module")
def site(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSite]:
    if reason := why_not():
        pytest.skip(reason)
    with open_lab() as lab:
        # Sooner than usual is a connection that is dead known to be; later than on a LAN, since a relay is slow under load.
        opened = open_nat_site(tmp_path_factory.mktemp("nat"), lab, forks, heartbeat_s="1.0", heartbeat_timeout_s="4.0")
        with opened as site:
            yield site


class Answer:
    """A prompt that is answered word by word, read in a thread."""

    def __init__(self, site: NatSite, asker: str, answerer: str) -> None:
        give_model(site, answerer, "tiny", site.folder / "tiny.gguf")
        until(f"{asker} hears of the model", lambda: lists(site, asker, "tiny"), 60.0)
        self._host, self._api = site.hosts[asker], site.peers[asker].api
        self.text, self.problem = "", ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        until("the answer begins", lambda: self.text, 60.0)

    def _read(self) -> None:
        body = {"model": "tiny", "prompt": WORDS}
        try:
            with (
                self._host.inside(),
                httpx.Client(trust_env=False, timeout=30.0) as client,
                client.stream("POST", self._api + "/api/generate", json=body) as reply,
            ):
                for line in reply.iter_lines():
                    word = json.loads(line)
                    self.text += word.get("response", "")
                    self.problem = word.get("error", "")
        except httpx.HTTPError as error:
            self.problem = repr(error)

    def until_over(self, within_s: float = 30.0) -> str:
        """What went wrong with it, '' for nothing."""
        self._thread.join(within_s)
        assert not self._thread.is_alive(), "the answer hangs"
        return self.problem

    def until_whole(self) -> None:
        self.until_over()
        assert self.text.strip() == WORDS, f"{self.problem}; {self.text[-100:]}"


def ask(site: NatSite, asker: str) -> bool:
    """Whether a prompt is answered. Raises httpx.HTTPError."""
    body = {"model": "tiny", "prompt": "one two", "stream": False}
    return bool(site.call(asker, "POST", "/api/generate", body, timeout_s=60.0).json()["response"].strip() == "one two")


@contextmanager
def told(site: NatSite) -> Iterator[None]:
    """What the peers logged is shown where something goes wrong."""
    try:
        yield
    except BaseException:
        print(site.tails())
        raise


def meet_directly(site: NatSite, left: str, right: str) -> None:
    site.until_met(left, right)
    for one, other in ((left, right), (right, left)):
        site.until_path(one, other, *DIRECT)


@pytest.mark.parametrize("fault", ["forgets", "readdressed"])
def test_a_pull_goes_on_when_a_router_forgets_its_mappings_or_gets_another_address(site: NatSite, fault: str) -> None:
    one, two = site.pair("port", "port", limits_up="8MB/s")
    path, _ = random_model(site.folder, 60)
    with told(site):
        meet_directly(site, one, two)
        give_model(site, two, "big", path)
        until(f"{one} hears of the model", lambda: lists(site, one, "big"), 60.0)
        site.call(one, "POST", "/api/v1/models/big/download", {})

        def done() -> float:
            shown = [one for one in site.get(one_name, "/api/v1/transfers")["transfers"] if one["direction"] == "in"]
            return shown[0]["bytes_done"] / (shown[0]["bytes_total"] or 1) if shown else 0.0

        one_name = one
        until("a third is there", lambda: done() > 0.3, 60.0)
        if fault == "forgets":
            site.routers[1].flush()
        else:
            site.routers[1].rebind(21 if site.routers[1].ip.endswith(".20") else 20)
        began_s = time.monotonic()
        until("everything is there", lambda: done() == 1.0, 60.0)
        print(f"whole {time.monotonic() - began_s:.1f} s after the fault")
        site.until_path(one, two, *DIRECT)


def test_an_answer_whose_router_forgets_goes_on_and_the_next_one_is_given(site: NatSite) -> None:
    one, two = site.pair("port", "port", **SLOW)
    with told(site):
        meet_directly(site, one, two)
        answer = Answer(site, one, two)
        site.routers[0].flush()
        answer.until_whole()  # the peer is met again by another way within seconds, and is the only one to ask
        began_s = time.monotonic()
        until("the next one is given", lambda: ask(site, one), 60.0)
        print(f"answered again {time.monotonic() - began_s:.1f} s after that")


def test_an_answer_that_began_over_a_relay_is_not_broken_by_the_move_to_a_direct_path(site: NatSite) -> None:
    one, two = site.pair("port", "port", **SLOW)
    with told(site):
        site.until_met(one, two)
        answer = Answer(site, one, two)
        site.until_path(one, two, *DIRECT)
        answer.until_whole()


def test_peers_whose_relay_dies_go_on_over_another_one(site: NatSite) -> None:
    one, two = site.pair("sym", "sym")
    with told(site):
        site.until_met(one, two)
        site.until_path(one, two, "relay")
        used = site.where(one, two)
        name = "point1" if f"/{NETWORK}.1/" in used else "point2"
        point = site.points_at[name]
        site.stop_bootstrap(point)
        try:
            began_s = time.monotonic()
            until("they notice", lambda: site.where(one, two) != used, 60.0)
            site.until_met(one, two, within_s=60.0)
            print(f"over another relay {time.monotonic() - began_s:.1f} s after the first one died")
            assert site.where(one, two) != used
            assert site.path(one, two) == "relay"
        finally:
            site.restart_point(name)


def test_peers_that_are_connected_directly_need_no_relay(site: NatSite) -> None:
    one, two = site.pair("port", "port")
    with told(site):
        meet_directly(site, one, two)
        for name in site.points_at:
            site.stop_bootstrap(site.points_at[name])
        try:
            time.sleep(4.0)  # twice what a dead connection takes to be noticed
            assert site.path(one, two) in DIRECT
            assert site.path(two, one) in DIRECT
            Answer(site, one, two).until_whole()
        finally:
            for name in site.points_at:
                site.restart_point(name)


def test_peers_that_both_change_their_network_at_once_meet_again_directly(site: NatSite) -> None:
    one, two = site.pair("port", "port")
    others = [site.internet.router(f"other{number}", number, "port") for number in (30, 40)]
    with told(site):
        meet_directly(site, one, two)
        for name, router in zip((one, two), others, strict=True):
            router.take(site.hosts[name])
        began_s = time.monotonic()
        until("it is connected from there", lambda: f"{NETWORK}.4" in site.where(one, two), 60.0)
        meet_directly(site, one, two)
        print(f"direct again {time.monotonic() - began_s:.1f} s after the change")
