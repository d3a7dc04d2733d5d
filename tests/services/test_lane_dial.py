"""A lane's connection is made by whichever way works first, and nobody waits twice for what does not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import ConnectError, NotOffered, PeerGone
from meshmax.base.ids import PeerId
from meshmax.core.lane_ways import RELAYED_S, LanePeer, Way, WayMemory
from meshmax.ports import ByteStream, FetchLane, Stream
from meshmax.services import lane_client
from meshmax.services.lane_client import OPEN_TIMEOUT_S, LaneOpener
from meshmax.services.lane_dial import HEAD_START_S, LaneDialling
from meshmax.services.lane_server import LaneServer
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.testing.memory_lanes import LaneNetwork, MemoryLanes, NoBytes
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner

SEEN = LanePeer(PeerId("p"), "11.22.33.44", False, "out", "direct")
BOTH: tuple[Way, ...] = ("direct", "signalled")


class Ways:
    """Two ways that take as long as said, and fail if said."""

    def __init__(self, direct: float, signalled: float, fails: tuple[Way, ...] = ()) -> None:
        self.takes_s: dict[Way, float] = {"direct": direct, "signalled": signalled}
        self.fails = fails
        self.begun: list[tuple[Way, float]] = []
        self.made: dict[Way, NoBytes] = {}
        self.memory = WayMemory()

    def dialling(self, ways: tuple[Way, ...] = BOTH) -> LaneDialling:
        dials = {way: self._dial(way) for way in ways}
        return LaneDialling(SEEN, ways, dials, self.memory)

    def _dial(self, way: Way) -> Callable[[], Awaitable[ByteStream]]:
        async def dial() -> ByteStream:
            self.begun.append((way, trio.current_time()))
            await trio.sleep(self.takes_s[way])
            if way in self.fails:
                raise ConnectError(f"{way} did not work")
            self.made[way] = NoBytes("11.22.33.44", 1)
            return self.made[way]

        return dial


async def test_a_direct_connection_that_comes_soon_needs_no_attempt(autojump_clock: trio.testing.MockClock) -> None:
    ways = Ways(0.1, 0.1)
    dialling = ways.dialling()
    assert await dialling() is ways.made["direct"]
    assert dialling.won == "direct"
    assert [way for way, _ in ways.begun] == ["direct"]


async def test_after_a_head_start_both_race_and_the_next_lane_does_not_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ways = Ways(100.0, 0.1)
    began_s = trio.current_time()
    assert await ways.dialling()() is ways.made["signalled"]
    assert trio.current_time() - began_s == pytest.approx(HEAD_START_S + 0.1)
    began_s = trio.current_time()
    await ways.dialling()()
    assert trio.current_time() - began_s == pytest.approx(0.1)


async def test_a_way_that_fails_at_once_gives_the_next_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    ways = Ways(0.01, 0.1, fails=("direct",))
    began_s = trio.current_time()
    await ways.dialling()()
    assert trio.current_time() - began_s == pytest.approx(0.11)


async def test_what_failed_lately_is_tried_when_the_rest_fails_too(autojump_clock: trio.testing.MockClock) -> None:
    ways = Ways(0.01, 0.1, fails=("direct",))
    await ways.dialling()()
    ways.fails = ("signalled",)
    dialling = ways.dialling()
    await dialling()
    assert dialling.won == "direct"


async def test_an_error_names_every_way(autojump_clock: trio.testing.MockClock) -> None:
    ways = Ways(0.01, 0.1, fails=BOTH)
    with pytest.raises(ConnectError, match=r"direct did not work.*signalled did not work"):
        await ways.dialling()()


async def test_a_connection_that_comes_in_the_moment_of_cancellation_is_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ways = Ways(1.0, 100.0)
    dialling = ways.dialling()
    with trio.move_on_after(1.0):
        await dialling()
        await trio.sleep(1)
    assert all(stream.closed for stream in ways.made.values()) or dialling.won == "direct"


# --- with a server ---------------------------------------------------------------------------------------------------


class Site:
    def __init__(self) -> None:
        self.lanes = LaneNetwork()
        self.network = MemoryNetwork()
        self.met: list[PeerId] = []
        self.strange = False  # the address that we dial is somebody else's

    async def open(self, stack: AsyncExitStack, ip: str | None) -> None:
        server = await stack.enter_async_context(self.network.open_swarm(SeededSigner(1)))
        fetcher = await stack.enter_async_context(self.network.open_swarm(SeededSigner(2)))
        ours = MemoryLanes(self.lanes, server.peer_id)
        LaneServer(MemoryBlobStore(), ours, Outflow(), Offers(trio.current_time)).register(server)
        await fetcher.dial(server.peer_id, server.addresses)
        self.server, self.fetcher = server.peer_id, fetcher
        self.opener = LaneOpener(fetcher, StrangeLanes(self, fetcher.peer_id), 2, lambda _: ip)

    async def signalled(self, peer: PeerId) -> ByteStream:
        self.met.append(peer)
        await trio.sleep(0.1)
        return NoBytes("11.22.33.44", 40000)


class StrangeLanes(MemoryLanes):
    """Where the peer's address is somebody else's, who answers and proves nothing."""

    def __init__(self, site: Site, peer: PeerId) -> None:
        super().__init__(site.lanes, peer)
        self._site = site

    async def connect(self, peer: PeerId, via: Any, ask: Any, grant: Any) -> Any:
        stream = await via()
        if self._site.strange and stream.remote[1] == self.port:
            raise ConnectError("who answers at the peer's lane port does not have the lane's key")

        async def dialled() -> ByteStream:
            await trio.lowlevel.checkpoint()
            return stream  # type: ignore[no-any-return]

        return await super().connect(peer, dialled, ask, grant)


@asynccontextmanager
async def opened(opener: LaneOpener, peer: PeerId) -> AsyncIterator[tuple[FetchLane, Stream]]:
    with trio.fail_after(5):
        async with opener.open_lane(peer) as (lane, stream):
            yield lane, stream


async def test_a_peer_behind_a_relay_is_met_otherwise(autojump_clock: trio.testing.MockClock) -> None:
    site = Site()
    async with AsyncExitStack() as stack:
        await site.open(stack, None)
        with pytest.raises(NotOffered):
            async with opened(site.opener, site.server):
                pass
        site.opener.signalled = site.signalled
        async with opened(site.opener, site.server) as (lane, _):
            assert lane.peer == site.server
        assert site.met == [site.server]


async def test_an_address_that_is_somebody_elses_costs_one_try_and_no_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    site = Site()
    site.strange = True
    async with AsyncExitStack() as stack:
        await site.open(stack, "10.0.0.2")
        with pytest.raises(ConnectError, match="lane's key"):
            async with opened(site.opener, site.server):
                pass
        site.opener.signalled = site.signalled
        for _ in range(2):
            async with opened(site.opener, site.server) as (lane, _):
                assert lane.peer == site.server
        assert site.met == [site.server] * 2
        assert not site.lanes.open


async def test_a_peer_that_is_not_connected_is_gone(autojump_clock: trio.testing.MockClock) -> None:
    site = Site()
    async with AsyncExitStack() as stack:
        await site.open(stack, None)
        with pytest.raises(PeerGone):
            async with opened(site.opener, PeerId("nobody")):
                pass


async def test_behind_a_relay_a_failed_attempt_is_not_repeated_soon_nor_said_twice(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, said = Site(), []
    tries: list[float] = []

    async def hopeless(_peer: PeerId) -> ByteStream:
        tries.append(trio.current_time())
        await trio.sleep(10)
        raise ConnectError("it took too long")

    monkeypatch.setattr(
        lane_client, "_log", SimpleNamespace(info=lambda *_, **words: said.append(words), debug=_nothing)
    )
    async with AsyncExitStack() as stack:
        await site.open(stack, None)
        views = site.fetcher.connections()
        relayed = {peer: msgspec.structs.replace(view, path="relay") for peer, view in views.items()}
        monkeypatch.setattr(site.fetcher, "connections", lambda: relayed)
        site.opener.signalled = hopeless
        for _ in range(40):
            try:
                with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
                    async with site.opener.open_lane(site.server):
                        pass
                assert opening.cancelled_caught
                site.opener.failed(site.server, PeerGone("no lane in time"))
            except NotOffered as error:
                site.opener.failed(site.server, error)
            await trio.sleep(30)
        gaps = [later - before for before, later in pairwise(tries)]
        assert len(tries) in (2, 3)
        assert min(gaps) >= RELAYED_S
        assert len(said) == 1
        site.opener.opened(site.server)
        site.opener.failed(site.server, PeerGone("no lane in time"))
        assert len(said) == 2


def _nothing(*_args: object, **_words: object) -> None: ...
