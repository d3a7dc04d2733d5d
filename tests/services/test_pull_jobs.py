"""Pulls that wait, are paused, outlive their watchers and their node's run, and share what they fetch; in virtual time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, InvalidRequest, ModelNotFound, NoProviders, NotFound, Refused
from meshmax.base.events import Download, Transfer
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.services.pull import MAX_ASKED
from meshmax.services.pull_job import ROOM_CHECK_S, WATCHED_WAIT_S
from tests.services.pull_site import NAME, Site, SitePeer, Store, model_bytes, open_site, sha256_of

Clock = trio.testing.MockClock


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  it looks from outside, as a person would
            await trio.sleep(0.01)


def shown(peer: SitePeer, transfer_id: str) -> Transfer:
    return next(transfer for transfer in peer.pulls.transfers() if transfer.id == transfer_id)


async def fetched(peer: SitePeer, transfer_id: str, chunks: int) -> None:
    await until(lambda: shown(peer, transfer_id).bytes_done > chunks * CHUNK_BYTES)


async def ended(peer: SitePeer, transfer_id: str, within_s: float = 60.0) -> Transfer:
    await until(lambda: shown(peer, transfer_id).state in ("done", "failed", "cancelled"), within_s)
    return shown(peer, transfer_id)


# --- detached --------------------------------------------------------------------------------------------------------


async def test_a_detached_pull_needs_no_watcher_and_is_remembered_until_it_has_ended(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(40)
        stored = await a.hold(data)
        begun = await c.pulls.start_download(NAME)
        assert begun.detached
        assert [(kept.id, kept.digest) for kept in c.kept] == [(begun.id, stored.manifest.digest)]
        async with c.pulls.open_pull(NAME) as values:  # a watcher that leaves does not end it
            async for value in values:
                if value.bytes_done > 10 * CHUNK_BYTES:
                    break
        assert (await ended(c, begun.id)).state == "done"
        assert c.store.blobs.content(sha256_of(data)) == data
        await until(lambda: c.kept == ())


async def test_a_watched_pull_that_is_made_detached_goes_on_when_its_watcher_leaves(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(40))
        async with c.pulls.open_pull(NAME) as values:
            first = await anext(aiter(values))
            assert (await c.pulls.start_download(NAME)).id == first.id
        assert (await ended(c, first.id)).state == "done"


async def test_a_download_of_what_is_here_is_done_and_of_what_nobody_has_refused(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(2))
        with pytest.raises(NoProviders):
            await c.pulls.start_download("nothing")
        await c.pull()
        begun = await c.pulls.start_download(NAME)
        assert begun.state == "done"
        assert shown(c, begun.id) == begun
        await c.pulls.start_download(NAME)
        assert [transfer.id for transfer in c.pulls.transfers()].count(begun.id) == 1


async def test_a_download_is_taken_up_by_the_next_run_and_fetches_only_what_is_missing(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a = await site.peer()
        data = model_bytes(60)
        await a.hold(data)
        async with site.open_peer() as c:
            begun = await c.pulls.start_download(NAME)
            await fetched(c, begun.id, 20)
        assert [kept.id for kept in c.kept] == [begun.id]  # ending the node does not end the download
        known = await c.store.blobs.haves(sha256_of(data))
        assert known is not None
        missing = known[1].missing()
        assert 0 < len(missing) < 40
        a.store.blobs.reads.clear()
        again = await site.peer(c.store, c.kept)
        last = await ended(again, begun.id)
        assert last.state == "done"
        assert sorted(a.served(sha256_of(data))) == missing
        assert again.told
        new = await again.pulls.start_download(NAME)
        assert new.id != begun.id


async def test_two_peers_with_parts_that_were_both_restarted_complete_each_other(autojump_clock: Clock) -> None:
    async with open_site() as site:
        data = model_bytes(60)
        async with site.open_peer() as a, site.open_peer() as b:
            stored = await a.hold(data)
            await b.pulls.start_download(NAME)
            await until(lambda: bool(b.pulls.partials()))
            await trio.lowlevel.checkpoint()
        assert b.kept[0].manifest == stored.manifest.raw  # nobody else is left who could tell what it consists of
        halves = (set(range(30)), set(range(30, 60)))
        peers = []
        for half in halves:
            store = Store()
            store.blobs.add_partial(data, half)
            store.blobs.add(a.store.blobs.content(stored.manifest.config.digest))
            peers.append(await site.peer(store, b.kept))
        for peer in peers:
            assert (await ended(peer, b.kept[0].id)).state == "done"
            assert peer.store.blobs.content(sha256_of(data)) == data
        assert [len(peer.served(sha256_of(data))) - 60 for peer in peers] == [30, 30]  # 60: each its own, to prove it


async def test_what_was_remembered_and_is_not_valid_is_dropped(autojump_clock: Clock) -> None:
    async with open_site() as site:
        odd = (
            Download("x-1", Sha256("ab" * 32), ("../../etc",)),
            Download("x-2", Sha256("ab" * 32), (NAME,), manifest=b"{"),
        )
        c = await site.peer(downloads=odd)
        await trio.sleep(1)
        assert c.pulls.transfers() == ()


async def test_a_detached_pull_waits_without_end_and_goes_on_at_once(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        spare = await site.peer(a.store)
        data = model_bytes(40)
        await a.hold(data)
        begun = await c.pulls.start_download(NAME)
        await fetched(c, begun.id, 10)
        site.network.kill(a.peer_id)
        await until(lambda: shown(c, begun.id).state == "waiting")
        assert "no peer that can be reached has the missing" in shown(c, begun.id).reason
        await trio.sleep(WATCHED_WAIT_S * 3)
        here = shown(c, begun.id)
        assert (here.state, here.rate_bytes_per_s) == ("waiting", 0.0)
        spare.state = "disk"
        back_s = trio.current_time()
        assert (await ended(c, begun.id)).state == "done"
        assert trio.current_time() - back_s < 3
        assert len(a.served(sha256_of(data))) <= 40 + 8  # both read from one store; some were in flight


async def test_a_detached_pull_waits_for_its_very_first_holder_after_a_restart(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a = await site.peer()
        stored = await a.hold(model_bytes(10))
        a.state = None
        downloads = (Download("ab-7", stored.manifest.digest, ("registry.ollama.ai/library/small:latest",)),)
        c = await site.peer(downloads=downloads)
        await until(lambda: shown(c, "ab-7").state == "waiting")
        await trio.sleep(1000)
        a.state = "disk"
        assert (await ended(c, "ab-7", 5)).state == "done"


# --- waiting ---------------------------------------------------------------------------------------------------------


async def test_a_watched_pull_whose_network_drops_waits_and_says_so_and_goes_on_when_it_is_back(
    autojump_clock: Clock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(60)
        await a.hold(data)
        seen: list[Transfer] = []

        async def drop_and_come_back() -> None:
            await a.swarm.disconnect(c.peer_id)
            site.network.partition(a.peer_id, c.peer_id)
            await trio.sleep(WATCHED_WAIT_S * 0.6)
            site.network.heal(a.peer_id, c.peer_id)
            await c.swarm.dial(a.peer_id, a.swarm.addresses)

        async with trio.open_nursery() as nursery:
            async with c.pulls.open_pull(NAME) as values:
                async for value in values:
                    if value.bytes_done > 20 * CHUNK_BYTES and not seen:
                        nursery.start_soon(drop_and_come_back)
                    if seen or value.bytes_done > 20 * CHUNK_BYTES:
                        seen.append(value)
        assert seen[-1].state == "done"
        (reason,) = {value.reason.partition(" has ")[0] for value in seen if value.state == "waiting"}
        assert reason == "no peer that can be reached"
        assert trio.current_time() < WATCHED_WAIT_S * 0.6 + 20
        double = len(a.served(sha256_of(data))) - 60
        assert double <= 8  # the chunks that were in flight


async def test_room_is_noticed_within_seconds(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(40))
        begun = await c.pulls.start_download(NAME)
        await fetched(c, begun.id, 10)
        c.store.blobs.full = True
        await until(lambda: shown(c, begun.id).state == "waiting")
        assert "full" in shown(c, begun.id).reason
        await trio.sleep(4000)
        c.store.blobs.full = False
        room_s = trio.current_time()
        assert (await ended(c, begun.id)).state == "done"
        assert trio.current_time() - room_s < ROOM_CHECK_S + 2


async def test_resuming_a_pull_that_waits_lets_it_try_at_once(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(40))
        c.store.blobs.full = True
        begun = await c.pulls.start_download(NAME)
        await until(lambda: shown(c, begun.id).state == "waiting")
        c.store.blobs.full = False
        room_s = trio.current_time()
        await c.pulls.steer(begun.id, "resume")
        await until(lambda: shown(c, begun.id).bytes_done > 0)
        assert trio.current_time() - room_s < 0.5


# --- steering --------------------------------------------------------------------------------------------------------


async def test_a_paused_pull_moves_nothing_holds_nothing_and_goes_on_where_it_was(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(60)
        await a.hold(data)
        states: list[str] = []
        paused: Transfer | None = None
        async with c.pulls.open_pull(NAME) as values:
            async for value in values:
                if value.bytes_done > 20 * CHUNK_BYTES and paused is None:
                    paused = await c.pulls.steer(value.id, "pause")
                    assert paused.state == "paused"
                    await trio.sleep(1)
                    assert c.store.blobs.open_partials == set()
                    assert not c.pulls._world.locks
                    served = len(a.served(sha256_of(data)))
                    await trio.sleep(1000)
                    assert len(a.served(sha256_of(data))) == served
                    assert (await c.pulls.steer(value.id, "resume")).state == "running"
                states.append(value.state)
        assert value.state == "done"
        assert "paused" in states
        assert len(a.served(sha256_of(data))) <= 60 + 8


async def test_a_paused_download_stays_paused_over_a_restart(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a = await site.peer()
        await a.hold(model_bytes(40))
        async with site.open_peer() as c:
            begun = await c.pulls.start_download(NAME)
            await fetched(c, begun.id, 10)
            await c.pulls.steer(begun.id, "pause")
            assert c.kept[0].paused
            paused = shown(c, begun.id)
        again = await site.peer(c.store, c.kept)
        await trio.sleep(100)
        assert shown(again, begun.id).state == "paused"
        assert shown(again, begun.id).bytes_done == paused.bytes_done >= 10 * CHUNK_BYTES
        assert shown(again, begun.id).bytes_total == paused.bytes_total
        assert c.store.blobs.open_partials == set()
        await again.pulls.steer(begun.id, "resume")
        assert (await ended(again, begun.id)).state == "done"


async def test_a_cancelled_download_is_forgotten_and_what_was_fetched_is_kept(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(60)
        await a.hold(data)
        begun = await c.pulls.start_download(NAME)
        await fetched(c, begun.id, 20)
        last = await c.pulls.steer(begun.id, "cancel")
        assert last.state == "cancelled"
        assert "kept" in last.reason
        assert c.kept == ()
        assert c.store.blobs.open_partials == set()
        known = await c.store.blobs.haves(sha256_of(data))
        assert known is not None
        assert known[1].total >= 20
        with pytest.raises(InvalidRequest, match="has ended already"):
            await c.pulls.steer(begun.id, "resume")
        assert (await c.pull())[-1].state == "done"


async def test_what_cannot_be_steered_says_why(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(10))
        with pytest.raises(NotFound, match="meshmax transfers"):
            await c.pulls.steer("x-1", "pause")
        await c.pull()
        out = next(transfer for transfer in a.pulls.transfers() if transfer.direction == "out")
        with pytest.raises(InvalidRequest, match="fetches it"):
            await a.pulls.steer(out.id, "pause")


async def test_who_must_know_is_told_of_a_pulls_beginning_pause_and_end(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(20))
        begun = await c.pulls.start_download(NAME)
        await until(lambda: bool(c.pulls.partials()))
        assert c.changes == 1
        await c.pulls.steer(begun.id, "pause")
        await c.pulls.steer(begun.id, "resume")
        assert c.changes == 3
        await ended(c, begun.id)
        await until(lambda: c.pulls.partials() == ())
        assert c.changes >= 4


# --- sharing ---------------------------------------------------------------------------------------------------------


async def two_models(site: Site, data: bytes) -> tuple[SitePeer, SitePeer]:
    """Two peers, each with a model of its own; the models share a blob."""
    a, b = await site.peer(), await site.peer()
    await a.hold_two_layers(data, b"one", "one:latest")
    await b.hold_two_layers(data, b"two", "two:latest")
    return a, b


async def test_two_models_that_share_a_blob_fetch_it_once_from_the_holders_of_both(autojump_clock: Clock) -> None:
    async with open_site() as site:
        data = model_bytes(80)
        a, b = await two_models(site, data)
        c = await site.peer()
        ids = [(await c.pulls.start_download(name)).id for name in ("one", "two")]
        await fetched(c, ids[0], 30)
        for peer in (a, b):
            site.network.freeze(peer.peer_id)
        await trio.sleep(1)
        assert abs(shown(c, ids[1]).bytes_done - shown(c, ids[0]).bytes_done) < 1000  # it shows how far the other is
        for peer in (a, b):
            site.network.thaw(peer.peer_id)
        for transfer_id in ids:
            assert (await ended(c, transfer_id)).state == "done"
        digest = sha256_of(data)
        assert len(a.served(digest)) + len(b.served(digest)) <= 80 + 2
        assert min(len(a.served(digest)), len(b.served(digest))) > 20
        assert not c.pulls._world.locks
        assert not c.pulls._world.wanted
        assert not c.pulls._world.fetching


async def test_when_the_pull_that_fetches_a_shared_blob_is_paused_the_other_takes_it_over(
    autojump_clock: Clock,
) -> None:
    async with open_site(latency_s=0.02) as site:
        data = model_bytes(80)
        a, b = await two_models(site, data)
        c = await site.peer()
        ids = [(await c.pulls.start_download(name)).id for name in ("one", "two")]
        await fetched(c, ids[0], 3)
        await c.pulls.steer(ids[0], "pause")
        assert (await ended(c, ids[1])).state == "done"
        assert shown(c, ids[0]).state == "paused"
        digest = sha256_of(data)
        assert len(a.served(digest)) + len(b.served(digest)) <= 80 + 40
        await c.pulls.steer(ids[0], "resume")
        assert (await ended(c, ids[0])).state == "done"
        assert len(a.served(digest)) + len(b.served(digest)) <= 80 + 40


async def test_a_pull_is_steered_by_its_models_name_too(autojump_clock: Clock) -> None:
    async with open_site(latency_s=0.02) as site:
        a, b = await site.peer(), await site.peer()
        await a.hold(model_bytes(60))
        begun = await b.pulls.start_download(NAME)
        assert (await b.pulls.steer(NAME, "pause")).id == begun.id
        assert shown(b, begun.id).state == "paused"
        with pytest.raises(NotFound):
            await b.pulls.steer("other", "pause")


# --- parts -----------------------------------------------------------------------------------------------------------


async def test_a_new_pull_starts_from_peers_that_have_only_parts_and_waits_for_the_rest(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        spare = await site.peer(a.store)
        data = model_bytes(60)
        await a.hold(data)
        first = await b.pulls.start_download(NAME)
        await fetched(b, first.id, 30)
        site.network.kill(a.peer_id)
        begun = await c.pulls.start_download(NAME)
        await until(lambda: shown(c, begun.id).state == "waiting")
        here = shown(c, begun.id)
        assert here.bytes_done > 30 * CHUNK_BYTES
        (big,) = (blob for blob in here.blobs if blob.size > CHUNK_BYTES)
        assert (big.haves + big.wants, big.haves) == (60, -(-big.done // CHUNK_BYTES))
        assert f"the missing {big.wants} of 60 chunks" in here.reason
        assert here.peers[b.peer_id].chunks >= 30
        spare.state = "disk"
        for peer, transfer_id in ((b, first.id), (c, begun.id)):
            assert (await ended(peer, transfer_id)).state == "done"


# --- asked by a peer -------------------------------------------------------------------------------------------------


async def test_a_peer_that_is_asked_pulls_it_detached_and_under_the_name_it_means_here(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        stored = await a.hold(model_bytes(10))
        digest = stored.manifest.digest
        transfer_id = await c.pulls.accept(a.peer_id, NAME, digest)
        assert c.kept[0].asked_by == a.peer_id
        with pytest.raises(Refused, match="another model"):
            await c.pulls.accept(a.peer_id, NAME, Sha256("ab" * 32))
        with pytest.raises(NoProviders):
            await c.pulls.accept(a.peer_id, "unheard-of", digest)
        assert (await ended(c, transfer_id)).state == "done"
        assert (await c.pulls.accept(a.peer_id, NAME, digest)).endswith("-0")


async def test_a_peer_that_does_not_take_requests_says_so(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a = await site.peer()
        stored = await a.hold(model_bytes(10))
        async with site.open_peer(accept=False) as c:
            with pytest.raises(Refused, match="accept_distribute"):
                await c.pulls.accept(a.peer_id, NAME, stored.manifest.digest)


async def test_pulls_that_peers_ask_for_are_few_at_once(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        stored = [await a.hold(model_bytes(20, seed), f"m{seed}:latest") for seed in range(MAX_ASKED + 1)]
        for model in stored[:-1]:
            await c.pulls.accept(a.peer_id, model.name, model.manifest.digest)
        with pytest.raises(Busy):
            await c.pulls.accept(a.peer_id, stored[-1].name, stored[-1].manifest.digest)
        await c.pulls.accept(a.peer_id, stored[0].name, stored[0].manifest.digest)  # it joins
        assert (await c.pulls.start_download(stored[-1].name)).state == "running"  # a person's own have room


async def test_a_name_that_only_a_pull_of_ours_bears_can_be_joined(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(40))
        begun = await c.pulls.start_download(NAME)
        await fetched(c, begun.id, 10)
        del site.names["registry.ollama.ai/library/small:latest"]
        with pytest.raises(ModelNotFound):
            c.resolve(NAME)
        assert (await c.pulls.start_download(NAME)).id == begun.id
