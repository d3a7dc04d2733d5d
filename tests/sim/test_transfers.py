"""Transfers on whole simulated nodes: parts as sources, downloads over restarts, peers that are asked."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import ModelNotFound
from meshmax.base.events import Transfer
from meshmax.core.limits import Override
from meshmax.node import Node
from meshmax.store.downloads import load_downloads
from tests.sim.site import online, open_site, until

CHUNKS = 48
SIZE = CHUNKS << 20


def shown(node: Node, transfer_id: str) -> Transfer:
    return next(transfer for transfer in node.pulls.transfers() if transfer.id == transfer_id)


async def test_a_model_that_is_nowhere_whole_is_pulled_from_parts_and_waits_for_the_rest(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = [await site.node(name) for name in ("a", "b", "c")]
        await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
        await site.add(a, "big", SIZE)
        await until(lambda: any(entry.name == "big:latest" for entry in b.catalog.entries()))
        blob = max(a.catalog.local()[0].manifest.blobs, key=lambda layer: layer.size)
        first = await b.pulls.start_download("big")
        with trio.fail_after(60):
            while (known := await b.store.blobs.haves(blob.digest)) is None or known[1].total < CHUNKS // 3:  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.0005)
        await b.pulls.steer(first.id, "pause")
        await a.catalog.delete("big")
        await until(lambda: not c.catalog.entries())
        with pytest.raises(ModelNotFound):
            c.catalog.resolve("big")  # nobody could answer a prompt
        assert c.catalog.resolve("big", parts=True).entry.partial_holders == (b.peer_id,)
        begun = await c.pulls.start_download("big")
        await until(lambda: shown(c, begun.id).state == "waiting")
        wants = next(each.wants for each in shown(c, begun.id).blobs if each.digest == blob.digest)
        assert 0 < wants <= CHUNKS - CHUNKS // 3 + 1
        assert [download.id for download in load_downloads(c.home.path)] == [begun.id]
        await site.add(a, "big", SIZE)
        await until(lambda: shown(c, begun.id).state == "done")
        await b.pulls.steer(first.id, "resume")
        await until(lambda: shown(b, first.id).state == "done")
        await until(lambda: load_downloads(c.home.path) == ())


async def test_a_peer_that_is_asked_downloads_and_who_gives_sees_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in ("a", "b")]
        await until(lambda: all(len(online(node)) == 1 for node in (a, b)))
        await site.add(a, "big", SIZE)
        answers = await a.distribution.replicate("big", 2)
        transfer_id = answers[b.peer_id]
        assert isinstance(transfer_id, str)
        await until(lambda: shown(b, transfer_id).state == "done")
        out = next(transfer for transfer in a.pulls.transfers() if transfer.direction == "out")
        assert out.model == "big:latest"
        assert out.peers[b.peer_id].bytes == out.bytes_done >= SIZE
        assert await a.distribution.replicate("big", 1) == {}


async def test_limits_of_simulated_peers_hold_in_virtual_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in ("a", "b")]
        await until(lambda: all(len(online(node)) == 1 for node in (a, b)))
        await site.add(a, "big", SIZE)
        await until(lambda: any(entry.name == "big:latest" for entry in b.catalog.entries()))
        await a.limits.set(Override(up=4_000_000))
        began_s = trio.current_time()
        begun = await b.pulls.start_download("big")
        await until(lambda: shown(b, begun.id).state == "done", 60)
        assert 0.95 <= (trio.current_time() - began_s) / (SIZE / 4_000_000) <= 1.1
