"""When mDNS begins a session anew, in virtual time, with sessions that a network ends."""

import pytest
import trio
import trio.testing

from meshmax.net import mdns as module
from meshmax.net.mdns import ANNOUNCE_PAUSE_S, RETRY_S, Mdns
from meshmax.net.multicast import Way
from meshmax.ports import Sighting
from meshmax.testing.memory_swarm import SeededSigner

GOODBYE_S = 2.0  # what the end of a session takes
TELLING_S = 1.5  # what an announcement takes, which is said several times


class Failing(Mdns):
    """Each session fails at once, and takes a while to end."""

    def __init__(self) -> None:
        super().__init__(SeededSigner(1).peer_id, tuple, (), list)
        self.began: list[float] = []

    async def _session(self, ways: tuple[Way, ...], found: trio.MemorySendChannel[Sighting]) -> None:
        self.began.append(trio.current_time())
        try:
            raise OSError("the network is down")
        finally:
            await trio.sleep(GOODBYE_S)  # noqa: ASYNC102  as a good-bye does


@pytest.mark.parametrize("at_s", [0.1, 1.0, 1.99, 2.01, 10.0])
async def test_at_whatever_moment_of_a_session_that_failed_it_is_to_look_again_the_next_one_begins_at_once(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    mdns = Failing()
    send, _ = trio.open_memory_channel[Sighting](1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mdns.run, send)
        await trio.sleep(20 * RETRY_S[1])
        count = len(mdns.began)
        while len(mdns.began) == count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        await trio.sleep_until(mdns.began[count] + at_s)
        mdns.look_again()
        looked_s = trio.current_time()
        while len(mdns.began) == count + 1:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        assert mdns.began[count + 1] - looked_s <= GOODBYE_S
        nursery.cancel_scope.cancel()
    assert len(mdns.began) < 50


@pytest.mark.parametrize("at_s", [0.0, 0.1, 1.0, 1.49, 1.51, 3.0, 4.0])
async def test_at_whatever_moment_of_an_announcement_it_is_to_look_again_another_one_follows_soon(
    at_s: float, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SeededSigner(1).peer_id
    mdns, told = Mdns(own, lambda: (f"/ip4/10.0.0.1/tcp/4001/p2p/{own}",), (), list), list[float]()

    async def tell(_work: object) -> None:
        told.append(trio.current_time())
        await trio.sleep(TELLING_S)

    monkeypatch.setattr(module, "call_asyncio", tell)
    monkeypatch.setattr(module, "announcing", lambda *_, **__: None)
    monkeypatch.setattr(module, "make_service", lambda *_: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mdns._announce, None, ())
        await trio.sleep(at_s)
        mdns.look_again()
        looked_s = trio.current_time()
        await trio.sleep(TELLING_S + ANNOUNCE_PAUSE_S + 0.1)
        assert any(at >= looked_s for at in told)
        count = len(told)
        await trio.sleep(600)
        assert len(told) == count  # and no more
        nursery.cancel_scope.cancel()
