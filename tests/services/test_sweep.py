"""The sweeper over memory: what it takes, what it leaves, whom pulls wait for, and what a fault costs."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.catalog import Listed
from meshmax.base.errors import StoreFull
from meshmax.base.ids import Sha256
from meshmax.base.model import Layer
from meshmax.base.names import parse_name
from meshmax.core.sweep import ALONE, ENOUGH, YOUNG, Budget
from meshmax.services.sweep import ASK_AGAIN_S, RECENT_S, SAVE_INTERVAL_S, SWEEP_INTERVAL_S, open_sweeper
from meshmax.store.usage import PartialUse
from meshmax.wire.protocols import LEASE
from tests.services.sweep_site import NOW_S, SweepPeer, gone, mute, open_sweep_site, why

BLOB = Sha256("cd" * 32)
MB = 10**6


def large(peer: SweepPeer, digest: Sha256) -> Layer:
    return max(peer.stored[digest].manifest.blobs, key=lambda blob: blob.size)


async def test_a_pinned_model_is_never_swept(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        a.pins.pin(parse_name("another-name"), digest)
        report = await a.sweep(last_copies=True)
        assert gone(report) == []
        assert why(report, digest) == "it is pinned"


@pytest.mark.parametrize("what", ["model", "blob"])
async def test_what_is_in_use_is_never_swept(what: str, autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        a.in_use = {digest if what == "model" else large(a, digest).digest: "it is loaded"}
        report = await a.sweep(last_copies=True)
        assert why(report, digest) == "it is loaded"


async def test_what_a_pull_needs_is_never_swept(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        a.needed = frozenset({large(a, digest).digest})
        assert why(await a.sweep(last_copies=True), digest) == "a pull needs its data"


async def test_what_was_used_a_moment_ago_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        a.used_s[digest] = NOW_S - RECENT_S + 5
        a.sweeper = a.new_sweeper()
        assert gone(await a.sweep()) == []
        await trio.sleep(6)
        assert gone(await a.sweep()) == ["m:latest"]


async def test_what_comes_into_use_while_its_lease_is_asked_for_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        b.blobs.delay_s = 1.0
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def load() -> None:
                await trio.sleep(0.5)
                a.in_use = {digest: "it is loaded"}

            report = await a.sweep()
        assert why(report, digest) == "it is loaded"


async def test_a_dry_run_changes_nothing_and_asks_nobody(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        b.swarm.serve(LEASE, mute)
        alone = await a.hold("alone")
        report = await a.sweep(dry_run=True)
        assert gone(report) == ["m:latest"]
        assert why(report, alone) == ALONE
        assert set(a.stored) == {digest, alone}
        assert trio.current_time() < 1


async def test_a_disk_that_fails_keeps_the_model_and_its_word(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        a.broken = True
        report = await a.sweep()
        assert why(report, digest) == "the disk is read-only"
        await trio.sleep(1000)
        assert gone(await b.sweep()) == ["m:latest"]  # a still vouches for its copy


async def test_without_a_budget_only_old_partials_go_by_themselves(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        old, young, wanted, part = (Sha256(letter * 64) for letter in "abcd")
        for each, touched_s in ((old, 200.0), (young, 50.0), (wanted, 200.0), (part, 200.0)):
            a.partials[each] = PartialUse(each, MB, NOW_S - touched_s)
        a.needed = frozenset({wanted})
        a.listed = (Listed(parse_name("damaged"), BLOB, ((part, MB),), "a blob is missing"),)
        report = await a.sweeper.sweep()
        assert gone(report) == ["partial"]
        assert report.freed == MB
        assert set(a.partials) == {young, wanted, part}
        assert why(report, young) == YOUNG
        assert why(report, wanted) == "a pull needs it"
        assert "repair" in why(report, part)
        assert why(report, digest) == ENOUGH


async def test_a_pull_gets_room_from_the_model_used_longest_ago(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), _ = await site.sharing(2)
        for name, age_s in (("old", 3000.0), ("new", 500.0)):
            await a.hold(name, age_s=age_s)
            await b.hold(name, age_s=age_s)
        used = (await a._usage()).used_bytes
        a.sweeper = a.new_sweeper(Budget(used))
        async with a.sweeper.room([Layer("m", BLOB, 1000)]):
            assert {stored.name for stored in a.stored.values()} == {"m:latest", "new:latest"}


async def test_a_pull_that_does_not_fit_is_told_what_is_lacking(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a,), digest = await site.sharing(1)
        a.sweeper = a.new_sweeper(Budget((await a._usage()).used_bytes + MB))
        with pytest.raises(StoreFull, match=r"9 MB more are needed \(disk_budget is .*dry-run"):
            async with a.sweeper.room([Layer("m", BLOB, 10 * MB)]):
                raise AssertionError("it does not fit")
        assert digest in a.stored


async def test_room_that_one_pull_was_given_is_not_given_to_another(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a,), _ = await site.sharing(1)
        a.sweeper = a.new_sweeper(Budget((await a._usage()).used_bytes + 10 * MB))
        other = Sha256("ef" * 32)
        async with a.sweeper.room([Layer("m", BLOB, 8 * MB)]):
            with pytest.raises(StoreFull):
                async with a.sweeper.room([Layer("m", other, 8 * MB)]):
                    raise AssertionError("it does not fit")
            async with a.sweeper.room([Layer("m", BLOB, 8 * MB)]):
                pass  # the same blob is fetched once
        async with a.sweeper.room([Layer("m", other, 8 * MB)]):
            pass


async def test_what_a_pull_has_fetched_already_is_counted_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a,), _ = await site.sharing(1)
        a.partials[BLOB] = PartialUse(BLOB, 7 * MB, NOW_S)
        a.sweeper = a.new_sweeper(Budget((await a._usage()).used_bytes + 3 * MB))
        async with a.sweeper.room([Layer("m", BLOB, 10 * MB)]):
            pass


async def test_a_pull_does_not_sweep_the_model_whose_blob_it_shares(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        a.sweeper = a.new_sweeper(Budget((await a._usage()).used_bytes))
        with pytest.raises(StoreFull):
            async with a.sweeper.room([large(a, digest), Layer("m", BLOB, MB)]):
                raise AssertionError("it does not fit")
        assert digest in a.stored


async def test_a_pull_that_waits_does_not_ask_the_same_holders_every_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        b.stored.pop(digest)  # what it says of itself is old
        asked = 0
        answer = b.leases.answer

        async def count(stream) -> None:  # type: ignore[no-untyped-def]
            nonlocal asked
            asked += 1
            await answer(stream)

        b.swarm.serve(LEASE, count)
        for _ in range(10):
            assert "not here" in why(await a.sweep(), digest)
            await trio.sleep(3)
        assert asked == 30 // ASK_AGAIN_S
        c = await site.peer()
        await c.hold("m")
        assert gone(await a.sweep()) == ["m:latest"]


async def test_it_sweeps_by_itself_now_and_then_and_soon_after_something_was_stored(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        a.sweeper = a.new_sweeper(Budget(1000))
        noted: list[float] = []
        saved: list[dict[Sha256, float]] = []

        async def save(uses: dict[Sha256, float]) -> None:
            await trio.lowlevel.checkpoint()
            saved.append(uses)

        def watch() -> None:
            noted.append(trio.current_time())
            a.sweeper.uses.note(BLOB, NOW_S + trio.current_time())

        begun = (lambda: a.needed, lambda digest: trio.Lock())
        async with open_sweeper(a.sweeper, *begun, watch, save):
            await trio.sleep(SWEEP_INTERVAL_S - 1)
            assert digest in a.stored
            await trio.sleep(2)
            assert digest not in a.stored
            other = await _again(a, b)
            a.sweeper.wake()
            await trio.sleep(1)
            assert other not in a.stored
            assert len(saved) <= 1 + SWEEP_INTERVAL_S // SAVE_INTERVAL_S
            assert len(noted) > 20
        assert saved[-1] == a.sweeper.uses.items()


async def _again(a: SweepPeer, b: SweepPeer) -> Sha256:
    sweeper = a.sweeper
    digest = await a.hold("again")
    await b.hold("again")
    a.sweeper = sweeper
    a.sweeper.uses.note(digest, NOW_S - 500)
    return digest


async def test_a_sweep_that_is_cancelled_between_lease_and_drop_loses_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        for tenth in range(40):
            with trio.move_on_after(tenth / 1000):
                await a.sweep()
            held = [digest in peer.stored for peer in (a, b)]
            assert any(held)
            if not held[0]:
                break
            await trio.sleep(1000)  # the lease it had is over
            a.sweeper = a.new_sweeper()
        assert digest not in a.stored
        assert digest in b.stored


async def test_names_of_a_model_go_together_and_the_report_tells_sizes(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, _), digest = await site.sharing(2)
        stored = a.stored[digest]
        report = await a.sweeper.sweep(free_bytes=1)
        (verdict,) = report.verdicts
        assert verdict.frees == sum(blob.size for blob in stored.manifest.blobs)
        assert (report.need, report.freed, report.lacking) == (1, verdict.frees, 0)
        assert msgspec.to_builtins(report.budget) == {"limit_bytes": None, "keep_free_bytes": 0}
