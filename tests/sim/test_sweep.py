"""Real nodes in virtual time sweep: what others have goes, the last copy, the pinned and the used stay."""

import json
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import InvalidRequest
from meshmax.core.sweep import ALONE, Budget
from meshmax.node import Node
from meshmax.services.sweep import RECENT_S, Report
from tests.sim.site import ask, online, open_site, pull, until

MB = 1_000_000
SIZE = 4 << 20
QUIET_S = RECENT_S + 20  # what was sent a moment ago counts as used for a while


def gone(report: Report) -> set[str]:
    return {name for v in report.verdicts if v.action == "goes" for name in getattr(v.candidate, "names", ())}


def why(report: Report, name: str) -> str:
    return next(v.reason for v in report.verdicts if name in getattr(v.candidate, "names", ()))


def here(node: Node) -> set[str]:
    return {stored.name for stored in node.catalog.local()}


def holders(node: Node, name: str) -> int:
    return len(node.catalog.resolve(name).entry.holders)


async def test_a_model_that_another_peer_has_goes_and_the_last_copy_stays(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, _ = [await site.node(name) for name in "abc"]
        await until(lambda: len(online(a)) == len(online(b)) == 2)
        await site.add(a, "shared")
        await site.add(a, "alone", SIZE + 4096)
        await until(lambda: len(b.catalog.entries()) == 2)
        await pull(b, "shared")
        await until(lambda: holders(a, "shared") == 2)
        await trio.sleep(QUIET_S)
        report = await a.garbage.sweeper.sweep(free_bytes=100 * MB, dry_run=True)
        assert gone(report) == {"shared:latest"}
        assert here(a) == {"shared:latest", "alone:latest"}
        report = await a.garbage.sweeper.sweep(free_bytes=100 * MB)
        assert gone(report) == {"shared:latest"}
        assert report.freed >= SIZE
        assert why(report, "alone:latest") == ALONE
        assert here(a) == {"alone:latest"}
        await until(lambda: holders(a, "shared") == 1)
        assert await ask(a, "shared", "where are you") == ("where are you", "b")
        report = await b.garbage.sweeper.sweep(free_bytes=100 * MB, last_copies=True)
        assert why(report, "shared:latest") == "it is loaded"
        await trio.sleep(400)
        assert gone(await b.garbage.sweeper.sweep(free_bytes=100 * MB)) == set()
        assert gone(await b.garbage.sweeper.sweep(free_bytes=100 * MB, last_copies=True)) == {"shared:latest"}


async def test_two_that_sweep_at_once_leave_one_copy(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in "ab"]
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        await pull(b, "m")
        await until(lambda: holders(a, "m") == holders(b, "m") == 2)
        await trio.sleep(QUIET_S)
        async with trio.open_nursery() as nursery:
            for node in (a, b):
                nursery.start_soon(lambda node=node: node.garbage.sweeper.sweep(free_bytes=MB))
        assert len(here(a)) + len(here(b)) == 1


async def test_pins_hold_over_a_restart_and_against_sweeps_deletion_and_another_meaning(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        await site.add(a, "m")
        pinned = await a.garbage.pinning.pin("m")
        assert pinned.pinned
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        assert a.catalog.resolve("m").entry.pinned
        await trio.sleep(QUIET_S)
        report = await a.garbage.sweeper.sweep(free_bytes=MB, last_copies=True)
        assert why(report, "m:latest") == "it is pinned"
        with pytest.raises(InvalidRequest, match="unpin"):
            await a.catalog.delete("m")
        with pytest.raises(InvalidRequest, match="unpin"):
            await site.add(a, "m", SIZE + 4096)
        assert a.catalog.resolve("m").digest == pinned.digest
        await a.garbage.pinning.unpin("m")
        report = await a.garbage.sweeper.sweep(free_bytes=MB, last_copies=True)
        assert gone(report) == {"m:latest"}


async def test_a_pull_that_does_not_fit_the_budget_sweeps_what_was_used_longest_ago(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in "ab"]
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        for number, name in enumerate(("old", "used", "wanted")):
            await site.add(a, name, SIZE + number * 4096)
        await until(lambda: len(b.catalog.entries()) == 3)
        await pull(b, "old")
        await pull(b, "used")
        for name in ("old", "used"):
            await ask(b, name, "hello")
            await trio.sleep(1000)
        b.garbage.sweeper.budget = Budget(3 * SIZE - SIZE // 2)
        transfer = await pull(b, "wanted")
        assert transfer.state == "done"
        assert here(b) == {"used:latest", "wanted:latest"}


async def test_a_pull_that_nothing_may_make_room_for_waits_and_says_so(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in "ab"]
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        b.garbage.sweeper.budget = Budget(MB)
        async with b.pulls.open_pull("m") as transfers:
            async for transfer in transfers:
                if transfer.state == "waiting":
                    assert "disk_budget" in transfer.reason
                    b.garbage.sweeper.budget = Budget(100 * MB)
        assert transfer.state == "done"


async def test_last_uses_survive_a_restart(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        await site.add(a, "m")
        await trio.sleep(500)
        await ask(a, "m", "hello")
        digest = a.catalog.resolve("m").digest
        used_s = a.garbage.sweeper.uses.items()[digest]
        await trio.sleep(100)
        kept = json.loads((tmp_path / "a" / "uses.json").read_text())
        assert kept == {digest: used_s}
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        assert a.garbage.sweeper.uses.items() == {digest: used_s}


async def test_a_pinned_name_is_not_pulled_as_another_model(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in "ab"]
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        await b.garbage.pinning.pin("m")
        assert b.catalog.resolve("m").entry.pinned
        await site.add(a, "m", SIZE + 4096)
        await until(lambda: len(b.catalog.entries()) == 2)
        other = next(entry.digest for entry in b.catalog.entries() if not entry.pinned)
        with pytest.raises(InvalidRequest, match="is pinned to model"):
            await pull(b, f"m@{other}")
        pinned = b.catalog.resolve("m").digest
        assert (await pull(b, "m")).state == "done"
        assert b.catalog.resolve("m").stored
        assert b.catalog.resolve("m").digest == pinned != other
