"""Pulls that prompts wait for, here and at other peers: shared, ended with the last who waits, hostile ends; in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, MeshmaxError, NoProviders, PeerGone, Refused
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.pull_server import MAX_WAITING_PER_PEER, REQUEST_TIMEOUT_S, PullServer
from meshmax.services.shared_pulls import SILENCE_S, WAIT_S, SharedPull, SharedPulls, open_shared_pulls
from meshmax.wire import pull as wire
from meshmax.wire.failure import Failure
from meshmax.wire.protocols import PULL
from tests.services.pull_site import NAME, SitePeer, model_bytes, open_site

Clock = trio.testing.MockClock


class Pair:
    """``holder`` has a model, ``puller`` can pull it, ``asker`` waits."""

    def __init__(
        self, holder: SitePeer, puller: SitePeer, asker: SitePeer, shared: SharedPulls, digest: Sha256
    ) -> None:
        self.holder, self.puller, self.asker = holder, puller, asker
        self.shared, self.digest = shared, digest

    def states(self, peer: SitePeer | None = None) -> list[str]:
        return [transfer.state for transfer in (peer or self.puller).pulls.transfers()]


@asynccontextmanager
async def open_pair(chunks: int = 20, *, accept: bool = True) -> AsyncIterator[Pair]:
    async with open_site() as site:
        holder, asker = await site.peer(), await site.peer()
        async with site.open_peer(accept=accept) as puller:
            stored = await holder.hold(model_bytes(chunks))
            asker.holds = puller.holds = set()
            PullServer(puller.pulls.open_asked).register(puller.swarm)
            async with open_shared_pulls(asker.swarm, asker.pulls) as shared:
                yield Pair(holder, puller, asker, shared, stored.manifest.digest)


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)


@pytest.mark.parametrize("here", [False, True])
async def test_it_is_pulled_while_somebody_waits_and_how_far_it_is_is_told(here: bool, autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        peer = pair.asker if here else pair.puller
        async with pair.shared.open_pull(peer.peer_id, NAME, pair.digest) as pull:
            await pull.wait()
            assert pull.done
        assert peer.told
        async with pair.shared.open_pull(peer.peer_id, NAME, pair.digest) as pull:  # it is there already
            await pull.wait()


@pytest.mark.parametrize("here", [False, True])
async def test_all_who_wait_share_one_pull_which_ends_with_the_last_of_them(here: bool, autojump_clock: Clock) -> None:
    async with open_pair(60) as pair:
        peer = pair.asker if here else pair.puller
        opened = [pair.shared.open_pull(peer.peer_id, NAME, pair.digest) for _ in range(100)]
        async with AsyncExitStack() as stack:
            pulls = [await stack.enter_async_context(each) for each in opened]
            assert len(set(map(id, pulls))) == 1
            await until(lambda: peer.pulls.transfers()[0].bytes_done > CHUNK_BYTES)
            assert pair.states(peer) == ["running"]
        await until(lambda: pair.states(peer) == ["cancelled"])
        assert peer.pulls.transfers()[0].bytes_done > CHUNK_BYTES
        async with pair.shared.open_pull(peer.peer_id, NAME, pair.digest) as pull:  # who comes later begins anew
            await pull.wait()
        assert pair.states(peer)[0] == "done"


async def test_who_refuses_is_told_to_everybody_who_waits(autojump_clock: Clock) -> None:
    async with open_pair(accept=False) as pair, trio.open_nursery() as nursery:

        async def refused() -> None:
            with pytest.raises(Refused, match="accept_distribute is off"):
                async with pair.shared.open_pull(pair.puller.peer_id, NAME, pair.digest):
                    pass

        for _ in range(3):
            nursery.start_soon(refused)


async def test_who_is_full_is_told_with_the_time_that_it_told(autojump_clock: Clock) -> None:
    async with open_pair() as pair:

        async def full(stream: Stream) -> None:
            frames = FrameStream(stream)
            await frames.send(wire.FROM_ASKED, Failure("busy", "as many as there is room for", 30.0))
            await stream.send_eof()

        pair.holder.swarm.serve(PULL, full)
        with pytest.raises(Busy) as caught:
            async with pair.shared.open_pull(pair.holder.peer_id, NAME, pair.digest):
                pass
        assert caught.value.retry_after_s == 30.0


@pytest.mark.parametrize("begun", [False, True])
async def test_a_node_that_ends_lets_nobody_wait_for_ever(begun: bool, autojump_clock: Clock) -> None:
    async with open_pair(60) as pair, trio.open_nursery() as nursery:

        async def silent(stream: Stream) -> None:
            if begun:
                await FrameStream(stream).send(wire.FROM_ASKED, wire.Pulling("running"))
            await trio.sleep_forever()

        pair.holder.swarm.serve(PULL, silent)

        async def waits(shared: SharedPulls) -> None:
            with pytest.raises(NoProviders, match="shutting down"):
                async with shared.open_pull(pair.holder.peer_id, NAME, pair.digest) as pull:
                    await pull.wait()

        async with open_shared_pulls(pair.asker.swarm, pair.asker.pulls) as shared:
            nursery.start_soon(waits, shared)  # noqa: ASYNC111  it ends with `shared`, which is what is tested
            await trio.sleep(1.0)
        nursery.cancel_scope.deadline = trio.current_time() + 1.0
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_pull_that_somebody_there_cancels_ends_the_waiting(autojump_clock: Clock) -> None:
    async with open_pair(60) as pair, pair.shared.open_pull(pair.puller.peer_id, NAME, pair.digest) as pull:
        await pair.puller.pulls.steer(pair.puller.pulls.transfers()[0].id, "cancel")
        with pytest.raises(MeshmaxError, match="cancelled"):
            await pull.wait()


async def test_a_paused_pull_is_waited_for_only_so_long(autojump_clock: Clock) -> None:
    async with open_pair(60) as pair, pair.shared.open_pull(pair.puller.peer_id, NAME, pair.digest) as pull:
        await pair.puller.pulls.steer(pair.puller.pulls.transfers()[0].id, "pause")
        began = trio.current_time()
        with pytest.raises(NoProviders, match="paused"):
            await pull.wait()
        assert PATIENCE_S <= trio.current_time() - began < PATIENCE_S + 5


async def test_an_asked_peer_that_falls_silent_or_is_lost_is_gone(autojump_clock: Clock) -> None:
    async with open_pair() as pair:

        async def silent(stream: Stream) -> None:
            await FrameStream(stream).send(wire.FROM_ASKED, wire.Pulling("running"))
            await trio.sleep_forever()

        pair.holder.swarm.serve(PULL, silent)
        async with pair.shared.open_pull(pair.holder.peer_id, NAME, pair.digest) as pull:
            with pytest.raises(PeerGone), trio.fail_after(SILENCE_S + 1):
                await pull.wait()
        pair.holder.swarm.serve(PULL, lambda stream: stream.reset())
        with pytest.raises(PeerGone):
            async with pair.shared.open_pull(pair.holder.peer_id, NAME, pair.digest):
                pass


async def test_a_peer_that_has_not_heard_of_the_model_yet_is_asked_again(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        asked = 0

        @asynccontextmanager
        async def late(peer: PeerId, name: str, digest: Sha256) -> AsyncIterator[AsyncIterator[Transfer]]:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise NoProviders("nobody has it")
            async with pair.puller.pulls.open_asked(peer, name, digest) as values:
                yield values

        PullServer(late).register(pair.holder.swarm)
        async with pair.shared.open_pull(pair.holder.peer_id, NAME, pair.digest) as pull:
            await pull.wait()
        asked = -10
        with pytest.raises(NoProviders):
            async with pair.shared.open_pull(pair.holder.peer_id, NAME, pair.digest):
                pass
        assert asked == -7


async def test_a_peer_waits_for_so_many_pulls_and_no_more(autojump_clock: Clock) -> None:
    async with open_pair(60) as pair, AsyncExitStack() as stack:

        async def ask() -> FrameStream:
            frames = FrameStream(await pair.asker.swarm.open_stream(pair.puller.peer_id, PULL))
            stack.push_async_callback(frames.stream.reset)
            await frames.send(wire.FROM_ASKER, wire.PullAsk(pair.digest, NAME))
            return frames

        for _ in range(MAX_WAITING_PER_PEER):
            news: wire.FromAsked = await (await ask()).receive(wire.FROM_ASKED)
            assert isinstance(news, wire.Pulling)
        refusal: wire.FromAsked = await (await ask()).receive(wire.FROM_ASKED)
        assert isinstance(refusal, Failure)
        assert refusal.code == Busy.code


@pytest.mark.parametrize("how", ["eof", "more", "reset", "garbage"])
async def test_an_asker_that_ends_its_side_or_says_more_waits_no_longer(how: str, autojump_clock: Clock) -> None:
    async with open_pair(60) as pair:
        stream = await pair.asker.swarm.open_stream(pair.puller.peer_id, PULL)
        frames = FrameStream(stream)
        await frames.send(wire.FROM_ASKER, wire.PullAsk(pair.digest, NAME))
        await frames.receive(wire.FROM_ASKED)
        if how == "eof":
            await stream.send_eof()
        elif how == "more":
            await frames.send(wire.FROM_ASKER, wire.PullAsk(pair.digest, NAME))
        elif how == "garbage":
            await stream.send_all(b"\xff" * 100)
        else:
            await stream.reset()
        await until(lambda: pair.states() == ["cancelled"])
        await stream.reset()


async def test_an_asker_that_asks_nothing_is_not_waited_for(autojump_clock: Clock) -> None:
    async with open_pair() as pair:
        stream = await pair.asker.swarm.open_stream(pair.puller.peer_id, PULL)
        with trio.fail_after(REQUEST_TIMEOUT_S + 1), pytest.raises(PeerGone):
            await FrameStream(stream).receive(wire.FROM_ASKED)
        assert pair.states() == []


@pytest.mark.parametrize("here", [False, True])
async def test_cancelled_at_any_moment_nothing_goes_on(here: bool, autojump_clock: Clock) -> None:
    for step in range(12):
        async with open_pair(4) as pair:
            peer = pair.asker if here else pair.puller
            with trio.move_on_after(step * 0.03):
                async with pair.shared.open_pull(peer.peer_id, NAME, pair.digest) as pull:
                    await pull.wait()
            await until(lambda: all(state in ("done", "cancelled") for state in pair.states(peer)))  # noqa: B023


async def test_a_source_that_is_back_soon_saves_the_waiting_and_one_that_is_not_ends_it(autojump_clock: Clock) -> None:
    pull = SharedPull("m")
    pull.on_news(False, 10, 100, "")
    began = trio.current_time()

    async def tell() -> None:
        await trio.sleep(PATIENCE_S + 1)
        pull.on_news(True, 10, 100, "nobody has the rest")
        await trio.sleep(PATIENCE_S - 1)
        pull.on_news(False, 10, 100, "")
        await trio.sleep(PATIENCE_S + 1)
        pull.on_news(False, 20, 100, "")
        pull.on_news(True, 20, 100, "nobody has the rest")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        with pytest.raises(NoProviders, match="nobody has the rest"):
            await pull.wait()
    assert trio.current_time() - began == pytest.approx(4 * PATIENCE_S + 1)


async def test_what_verifies_needs_no_bytes_and_what_goes_on_is_waited_for(autojump_clock: Clock) -> None:
    pull = SharedPull("m")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull.wait)
        for _ in range(20):
            await trio.sleep(WAIT_S / 2)
            pull.on_news(False, 100, 100, "")
        pull.end()
        pull.end(NoProviders("too late"))
    assert pull.done
    await pull.wait()
