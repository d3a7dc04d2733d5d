"""Leases over a network in memory: who has a model proves it and keeps it; liars, mutes and sweepers vouch for nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import NoProviders, PeerGone, Refused, RemoteProtocolError, StoreCorrupt
from meshmax.base.ids import Sha256
from meshmax.core.lease import LEASE_S
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.leases import ASK_TIMEOUT_S, DISTRUST_S, MAX_ANSWERS_PER_PEER, PROBES, choose_probes
from meshmax.wire import lease as wire
from meshmax.wire.failure import Failure
from meshmax.wire.protocols import LEASE
from tests.services.sweep_site import SweepPeer, SweepSite, gone, mute, open_sweep_site, why


async def get(asker: SweepPeer, holder: SweepPeer, digest: Sha256) -> str | None:
    """Who granted, and whether the copy may be dropped."""
    manifest = asker.stored[digest].manifest
    async with asker.leases.open(manifest, {holder.peer_id: holder.swarm.addresses}) as lease:
        return lease.holder if lease.commit() else None


async def test_a_holder_that_has_the_model_whole_leases_it_and_then_keeps_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        assert await get(a, b, digest) == b.peer_id
        with pytest.raises(Refused, match="relies on this copy"):
            await get(b, a, digest)
        await trio.sleep(LEASE_S)
        assert await get(b, a, digest) == a.peer_id


async def lie(stream: Stream, reply: wire.FromHolder) -> None:
    frames = FrameStream(stream)
    await frames.receive(wire.FROM_ASKER)
    await frames.send(wire.FROM_HOLDER, reply)
    await stream.aclose()


@pytest.mark.parametrize(
    "reply",
    [
        wire.Leased(60.0, b"\0" * 32),
        Failure("busy", "not now", 1.0),
        Failure("model_not_found", "never had it"),
        Failure("store_corrupt", "my disk"),
        Failure("made_up", "whatever"),
    ],
)
async def test_who_proves_nothing_or_refuses_is_no_holder(
    reply: wire.FromHolder, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        b.swarm.serve(LEASE, lambda stream: lie(stream, reply))
        report = await a.sweep()
        assert gone(report) == []
        assert "no other peer vouches" in why(report, digest)


async def test_a_holder_that_lacks_the_chunks_cannot_prove_them(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        for blob in b.stored[digest].manifest.blobs:
            b.blobs.remove(blob.digest)
        assert gone(await a.sweep()) == []


async def test_a_damaged_copy_is_leased_to_nobody(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        for blob in b.stored[digest].manifest.blobs:  # all of it: few chunks are asked for, and none can foresee which
            for index in range(-(-blob.size // (1 << 20))):
                b.blobs.corrupt(blob.digest, index)
        assert gone(await a.sweep()) == []


async def test_a_silent_holder_costs_its_time_once_and_counts_for_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_sweep_site() as site:
        (a, b), _ = await site.sharing(2)
        for number in range(5):
            name = f"further{number}"
            await a.hold(name)
            await b.hold(name)
        b.swarm.serve(LEASE, mute)
        began_s = trio.current_time()
        assert gone(await a.sweep()) == []
        assert trio.current_time() - began_s < ASK_TIMEOUT_S + 1


async def test_a_mute_holder_is_asked_again_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        site.network.partition(a.peer_id, b.peer_id)
        assert gone(await a.sweep()) == []
        site.network.heal(a.peer_id, b.peer_id)
        await trio.sleep(DISTRUST_S + 1)
        assert gone(await a.sweep()) == ["m:latest"]
        assert digest in b.stored


async def test_the_next_holder_is_asked_when_the_first_does_not_vouch(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b, c), digest = await site.sharing(3)
        b.swarm.serve(LEASE, lambda stream: lie(stream, wire.Leased(60.0, b"\0" * 32)))
        assert gone(await a.sweep()) == ["m:latest"]
        assert digest in c.stored
        with pytest.raises(Refused, match=a.peer_id):
            await get(c, b, digest)


async def test_our_own_damaged_copy_is_not_dropped_on_somebodys_word(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        for blob in a.stored[digest].manifest.blobs:
            for index in range(-(-blob.size // (1 << 20))):
                a.blobs.corrupt(blob.digest, index)
        with pytest.raises(StoreCorrupt):
            await get(a, b, digest)


async def test_a_lease_asked_for_too_long_ago_is_not_used(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        manifest = a.stored[digest].manifest
        async with a.leases.open(manifest, {b.peer_id: b.swarm.addresses}) as lease:
            await trio.sleep(LEASE_S)
            assert not lease.commit()


@pytest.mark.parametrize("payload", [b"\0\0\0\x01\xc1", b"\xff\xff\xff\xff", b"\0\0\0\x05abc", b""])
async def test_garbage_ends_the_stream_and_grants_nothing(
    payload: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        await a.swarm.dial(b.peer_id, b.swarm.addresses)
        stream = await a.swarm.open_stream(b.peer_id, LEASE)
        await stream.send_all(payload)
        await stream.send_eof()
        with pytest.raises((RemoteProtocolError, PeerGone)):  # reset or ended, as the network has it
            await FrameStream(stream).receive(wire.FROM_HOLDER)
        assert await get(a, b, digest) == b.peer_id


async def test_probes_of_blobs_that_are_not_the_models_are_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        secret = await b.hold("secret")
        probe = wire.Probe(b.stored[secret].manifest.blobs[-1].digest, 0)
        await a.swarm.dial(b.peer_id, b.swarm.addresses)
        frames = FrameStream(await a.swarm.open_stream(b.peer_id, LEASE))
        await frames.send(wire.FROM_ASKER, wire.LeaseAsk(digest, b"n" * 32, (probe,)))
        reply = await frames.receive(wire.FROM_HOLDER)
        assert isinstance(reply, Failure)


async def test_asks_at_once_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a, b), digest = await site.sharing(2)
        b.blobs.delay_s = 1.0
        await a.swarm.dial(b.peer_id, b.swarm.addresses)
        replies: list[wire.FromHolder] = []
        probes = choose_probes(a.stored[digest].manifest)

        async def ask() -> None:
            frames = FrameStream(await a.swarm.open_stream(b.peer_id, LEASE))
            await frames.send(wire.FROM_ASKER, wire.LeaseAsk(digest, b"n" * 32, probes))
            replies.append(await frames.receive(wire.FROM_HOLDER))

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_ANSWERS_PER_PEER + 3):
                nursery.start_soon(ask)
        codes = [reply.code for reply in replies if isinstance(reply, Failure)]
        assert codes.count("busy") == 3
        assert sum(isinstance(reply, wire.Leased) for reply in replies) == 1


async def test_probes_are_chunks_of_the_model(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a,), digest = await site.sharing(1)
        manifest = a.stored[digest].manifest
        sizes = {blob.digest: blob.size for blob in manifest.blobs}
        for _ in range(50):
            probes = choose_probes(manifest)
            assert 1 <= len(probes) <= PROBES
            assert all(probe.index << 20 < sizes[Sha256(probe.blob)] for probe in probes)


async def nobody_vouches(site: SweepSite, peer: SweepPeer, digest: Sha256) -> None:
    with pytest.raises(NoProviders, match="none is known"):
        async with peer.leases.open(peer.stored[digest].manifest, {}):
            pass


async def test_without_holders_there_is_no_lease(autojump_clock: trio.testing.MockClock) -> None:
    async with open_sweep_site() as site:
        (a,), digest = await site.sharing(1)
        await nobody_vouches(site, a, digest)


delays = st.floats(0, 0.05)


@settings(max_examples=40)
@given(
    st.integers(2, 4),
    st.lists(delays, min_size=4, max_size=4),
    st.lists(delays, min_size=4, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), delays, delays), max_size=3),
)
def test_of_peers_that_sweep_at_once_one_keeps_the_model_and_of_two_exactly_one_drops_it(
    count: int, starts: list[float], reading: list[float], cuts: list[tuple[int, int, float, float]]
) -> None:
    async def main() -> None:
        async with open_sweep_site() as site:
            peers, digest = await site.sharing(count)

            async def sweep(peer: SweepPeer, start_s: float) -> None:
                await trio.sleep(start_s)
                await peer.sweep()

            async def cut(one: int, other: int, at_s: float, for_s: float) -> None:
                await trio.sleep(at_s)
                pair = peers[one % count].peer_id, peers[other % count].peer_id
                site.network.partition(*pair)
                await trio.sleep(for_s)
                site.network.heal(*pair)

            async with trio.open_nursery() as nursery:
                for peer, start_s, delay_s in zip(peers, starts, reading, strict=False):
                    peer.blobs.delay_s = delay_s
                    nursery.start_soon(sweep, peer, start_s)
                for each in cuts:
                    nursery.start_soon(cut, *each)
            left = sum(digest in peer.stored for peer in peers)
            assert left >= 1
            if count == 2 and not cuts:
                assert left == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
