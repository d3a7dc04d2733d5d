"""Asking peers to pull: named ones, numbers of replicas, refusals."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from meshmax.base.errors import InvalidRequest, ModelNotFound, NotFound, PeerGone, Refused
from meshmax.base.ids import peer_id_of
from meshmax.services.distribute import MAX_PEERS, Distribution
from tests.services.pull_site import NAME, SitePeer, model_bytes, open_site

Clock = trio.testing.MockClock


def distribution(peer: SitePeer) -> Distribution:
    return Distribution(peer.swarm, peer, peer, peer.pulls.start_download)


async def pulled(peer: SitePeer) -> None:
    with trio.fail_after(30):
        while not peer.told:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.05)


async def test_named_peers_pull_it_and_tell_the_ids_of_their_transfers(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await a.hold(model_bytes(10))
        a.holds, b.holds, c.holds = None, set(), set()
        answers = await distribution(a).distribute(NAME, [b.peer_id, c.peer_id, b.peer_id])
        for peer in (b, c):
            assert answers[peer.peer_id] == peer.pulls.transfers()[0].id
            await pulled(peer)


async def test_who_refuses_or_is_gone_is_told_beside_who_does_not(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b = await site.peer(), await site.peer()
        gone = peer_id_of(b"\x99" * 32)
        await a.hold(model_bytes(10))
        async with site.open_peer(accept=False) as c:
            answers = await distribution(a).distribute(NAME, [b.peer_id, c.peer_id, gone])
            assert isinstance(answers[b.peer_id], str)
            assert isinstance(answers[c.peer_id], Refused)
            assert isinstance(answers[gone], PeerGone)


async def test_as_many_are_asked_as_replicas_are_lacking(autojump_clock: Clock) -> None:
    async with open_site() as site:
        peers = [await site.peer() for _ in range(4)]
        a = peers[0]
        stored = await a.hold(model_bytes(10))
        for peer in peers[1:]:
            peer.holds = set()
        # A peer sees itself by its own status, which the site does not tell: the holder asks from another place.
        work = distribution(peers[3])
        answers = await work.replicate(NAME, 3)
        assert set(answers) == {peers[1].peer_id, peers[2].peer_id}
        for peer in peers[1:3]:
            await pulled(peer)
            peer.holds = {stored.manifest.digest}
        assert await work.replicate(NAME, 3) == {}
        assert set(await work.replicate(NAME, 4)) == {peers[3].peer_id}  # itself last
        with pytest.raises(NotFound, match="5 replicas need 2 more peers, and 1"):
            await work.replicate(NAME, 5)


async def test_a_peer_that_has_not_heard_of_the_model_yet_is_asked_again(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b = await site.peer(), await site.peer()
        await a.hold(model_bytes(10))
        a.state = None

        async def be_heard_of() -> None:
            await trio.sleep(1.5)
            a.state = "disk"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(be_heard_of)
            answers = await distribution(a).distribute(NAME, [b.peer_id])
        assert isinstance(answers[b.peer_id], str)


async def test_what_nobody_has_and_lists_without_end_are_refused(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a = await site.peer()
        with pytest.raises(ModelNotFound):
            await distribution(a).distribute("nothing", [])
        with pytest.raises(InvalidRequest):
            await distribution(a).distribute(NAME, [a.peer_id] * (MAX_PEERS + 1))
