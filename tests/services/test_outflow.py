"""What we send: per model and peer, with rates, bounded, from any thread."""

from __future__ import annotations

import threading

import trio
import trio.testing

from meshmax.base.ids import Sha256, peer_id_of
from meshmax.services.outflow import IDLE_S, MAX_ENDED, MAX_FLOWS, Outflow
from tests.services.pull_site import model_bytes, open_site

Clock = trio.testing.MockClock
KITCHEN, ATTIC = (peer_id_of(bytes([n]) * 32) for n in (1, 2))
BIG, SMALL, LOOSE = (Sha256(c * 64) for c in "abc")
MODEL = Sha256("d" * 64)


def owner(blob: Sha256) -> tuple[Sha256, str] | None:
    return (MODEL, "llama3:latest") if blob in (BIG, SMALL) else None


async def test_what_is_sent_of_one_model_is_one_transfer_with_each_peers_share(autojump_clock: Clock) -> None:
    outflow = Outflow(owner)
    for _ in range(10):
        outflow.note(KITCHEN, BIG, 1000)
        outflow.note(ATTIC, SMALL, 10)
        outflow.transfers()
        await trio.sleep(1)
    outflow.note(ATTIC, LOOSE, 5)
    loose, sent = outflow.transfers()
    assert (sent.model, sent.direction, sent.state, sent.bytes_done) == ("llama3:latest", "out", "running", 10_100)
    assert {peer: gave.bytes for peer, gave in sent.peers.items()} == {KITCHEN: 10_000, ATTIC: 100}
    assert 700 < sent.peers[KITCHEN].rate_bytes_per_s < 1200
    assert {blob.digest: blob.done for blob in sent.blobs} == {BIG: 10_000, SMALL: 100}
    assert (loose.model, loose.bytes_done) == (f"blob {LOOSE[:12]}", 5)
    assert loose.id != sent.id


async def test_a_transfer_is_done_when_nothing_was_sent_for_long_and_another_begins_with_the_next_byte(
    autojump_clock: Clock,
) -> None:
    outflow = Outflow(owner)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outflow.run)
        outflow.note(KITCHEN, BIG, 1000)
        await trio.sleep(IDLE_S - 2)
        (first,) = outflow.transfers()
        assert first.state == "running"
        await trio.sleep(4)
        (over,) = outflow.transfers()
        assert (over.id, over.state, over.bytes_done, over.rate_bytes_per_s) == (first.id, "done", 1000, 0.0)
        outflow.note(KITCHEN, BIG, 7)
        new, old = outflow.transfers()
        assert (new.state, new.bytes_done) == ("running", 7)
        assert old == over
        assert new.id != old.id
        nursery.cancel_scope.cancel()


async def test_notes_come_from_any_thread_and_none_is_lost(autojump_clock: Clock) -> None:
    outflow = Outflow(owner)

    def send() -> None:
        for _ in range(2000):
            outflow.note(KITCHEN, BIG, 3)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await trio.lowlevel.checkpoint()
    (sent,) = outflow.transfers()
    assert sent.bytes_done == 4 * 2000 * 3


async def test_tables_are_bounded(autojump_clock: Clock) -> None:
    outflow = Outflow()
    for number in range(MAX_FLOWS + 500):
        outflow.note(KITCHEN, Sha256(f"{number:064x}"), 1)
    assert len(outflow.transfers()) == MAX_FLOWS
    await trio.sleep(IDLE_S)
    assert len(outflow.transfers()) == MAX_ENDED


async def test_a_peer_that_serves_sees_who_got_how_much(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        stored = await a.hold(model_bytes(30))
        for peer in (b, c):
            await peer.pull()
            site.network.partition(b.peer_id, c.peer_id)
        sent = [transfer for transfer in a.pulls.transfers() if transfer.direction == "out"]
        got = {peer: sum(transfer.peers[peer].bytes for transfer in sent) for peer in (b.peer_id, c.peer_id)}
        assert got == {b.peer_id: stored.manifest.size, c.peer_id: stored.manifest.size}
