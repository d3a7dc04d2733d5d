"""services.mirror: pulls begin and end with their hours, in virtual time, over a link that is there now and then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from meshmax.base.config import MirrorRule
from meshmax.base.errors import NoProviders
from meshmax.base.events import Transfer, TransferState
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.names import parse_name
from meshmax.base.status import ModelPresence, PeerStatus, PeerView
from meshmax.core.mirror import MirrorPlan
from meshmax.services import mirror as service
from meshmax.services.mirror import Mirror

SITE_B = PeerId("12D3KooWsiteB")
DIGEST = Sha256("b" * 64)


class FakePulls:
    """Pulls that take ``size`` seconds altogether, over all tries."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.here: list[Any] = []
        self.done: dict[str, float] = {}
        self.running = 0
        self.most = 0
        self.size = 100.0
        self.ends: TransferState = "done"
        self.link = True

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        await trio.lowlevel.checkpoint()
        if not self.link:
            raise NoProviders
        self.begun.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        began = trio.current_time()
        try:
            yield self._values(name)
        finally:
            self.running -= 1
            self.done[name] = self.done.get(name, 0.0) + trio.current_time() - began

    async def _values(self, name: str) -> AsyncIterator[Transfer]:
        yield Transfer("x-1", name, "in", "running")
        await trio.sleep(self.size - self.done.get(name, 0.0))
        if self.ends == "done":
            text, _, digest = name.partition("@")
            self.here.append(SimpleNamespace(name=text, manifest=SimpleNamespace(digest=digest)))
        yield Transfer("x-1", name, "in", self.ends)


class Site:
    """Peer site-b with ``models`` (name -> digest), the time of day, and what is here."""

    def __init__(self, *rules: MirrorRule) -> None:
        self.pulls = FakePulls()
        self.models = {"llama3": DIGEST}
        self.online = True
        self.minute_at_start = 0
        self.weekday = 0
        pulls: Any = self.pulls
        self.mirror = Mirror(MirrorPlan(rules or [MirrorRule("*", "site-b")]), pulls, self.views, self.local, self.now)

    def now(self) -> tuple[int, int]:
        minute = self.minute_at_start + int(trio.current_time() // 60)
        return minute // 1440 % 7, minute % 1440

    def views(self) -> list[PeerView]:
        models = tuple(ModelPresence(d, (parse_name(n).full,), "disk", 1) for n, d in self.models.items())
        status = PeerStatus(SITE_B, 1, 1, "site-b", "1", models=models)
        return [PeerView(SITE_B, "online" if self.online else "offline", "direct", status)]

    def local(self) -> list[Any]:
        return self.pulls.here


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.mirror.run)
        yield
        nursery.cancel_scope.cancel()


async def test_what_the_peer_has_is_pulled_by_its_digest(autojump_clock: object) -> None:
    site = Site()
    async with running(site):
        await trio.sleep(1)
        assert site.pulls.begun == [f"llama3:latest@{DIGEST}"]


async def test_a_pull_ends_with_its_hours_and_goes_on_in_the_next_ones(autojump_clock: object) -> None:
    site = Site(MirrorRule("*", "site-b", at="01:00-02:00"))
    site.pulls.size = 5000.0
    async with running(site):
        await trio.sleep(59 * 60)
        assert not site.pulls.begun
        await trio.sleep(30 * 60)
        assert site.pulls.running == 1
        await trio.sleep(32 * 60)
        assert site.pulls.running == 0
        assert 3590 <= site.pulls.done[f"llama3:latest@{DIGEST}"] <= 3610
        await trio.sleep(24 * 3600)
        assert len(site.pulls.begun) == 2
        assert site.pulls.done[f"llama3:latest@{DIGEST}"] == pytest.approx(5000.0, abs=1)


async def test_a_link_that_comes_back_is_used_again(autojump_clock: object) -> None:
    site = Site()
    site.pulls.link = False
    async with running(site):
        await trio.sleep(120)
        assert not site.pulls.begun
        site.pulls.link = True
        await trio.sleep(service.RETRY_S + 10)
        assert len(site.pulls.begun) == 1


async def test_a_pull_that_failed_is_tried_again_after_a_while(autojump_clock: object) -> None:
    site = Site()
    site.pulls.size, site.pulls.ends = 1.0, "failed"
    async with running(site):
        await trio.sleep(service.RETRY_S * 3)
        assert 2 <= len(site.pulls.begun) <= 4


async def test_a_pull_that_a_person_cancelled_is_left_alone_until_the_next_hours(autojump_clock: object) -> None:
    site = Site(MirrorRule("*", "site-b", at="00:00-02:00"))
    site.pulls.size, site.pulls.ends = 10.0, "cancelled"
    async with running(site):
        await trio.sleep(2 * 3600)
        assert len(site.pulls.begun) == 1
        await trio.sleep(24 * 3600)
        assert len(site.pulls.begun) == 2


async def test_few_models_are_pulled_at_once(autojump_clock: object) -> None:
    site = Site()
    site.models = {f"m{number}": Sha256(f"{number:064x}") for number in range(10)}
    async with running(site):
        await trio.sleep(1500)
        assert site.pulls.most == service.MAX_AT_ONCE
        assert len(set(site.pulls.begun)) == 10


async def test_a_newer_one_under_the_name_takes_the_place_of_the_one_that_is_pulled(autojump_clock: object) -> None:
    site = Site()
    site.pulls.size = 10_000.0
    async with running(site):
        await trio.sleep(20)
        site.models = {"llama3": Sha256("c" * 64)}
        await trio.sleep(20)
        assert site.pulls.begun[1].endswith("c" * 64)
        assert site.pulls.running == 1


async def test_a_peer_that_leaves_does_not_end_the_pull_that_others_may_serve(autojump_clock: object) -> None:
    site = Site()
    async with running(site):
        await trio.sleep(20)
        site.online = False
        await trio.sleep(20)
        assert site.pulls.running == 1
