"""What happens while a peer is dialled, in virtual time: our mesh or our network is another when the dial ends."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.base.errors import ConnectError, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus
from meshmax.core.peers import SPREAD_S, YIELD_S
from meshmax.services.presence import DIAL_DEADLINE_S, PATIENCE_S, PresenceService, open_presence
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from tests.services.presence_site import Told

ADDRESS = "/ip4/10.0.0.1/tcp/1"
OTHER = SeededSigner(2).peer_id
TAKES_S = 1.0


class Dials:
    """Dials that are refused, or never answered, TAKES_S after they began; when each began."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.refused = True
        self.takes_s = TAKES_S

    async def connect(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        self.began.append(trio.current_time())
        refused = self.refused
        await trio.sleep(self.takes_s)
        raise NotAMember("another mesh") if refused else ConnectError("nobody is there")


@asynccontextmanager
async def opened(dials: Dials) -> AsyncIterator[PresenceService]:
    signer = SeededSigner(1)
    async with (
        MemoryNetwork().open_swarm(signer) as swarm,
        open_presence(
            swarm,
            signer,
            Config(),
            lambda: PeerStatus(signer.peer_id, 0, 0, "us", "0"),
            Told(),
            lambda: 1_700_000_000.0 + trio.current_time(),
            random.Random(1),
            connect=dials.connect,
        ) as presence,
    ):
        yield presence


@pytest.mark.parametrize("at_s", [0.0, 0.2, 0.5, 0.999, 1.0, 1.001, 3.0])
async def test_at_whatever_moment_of_a_dial_that_is_refused_our_mesh_is_another_the_peer_is_dialled_for_it(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    dials = Dials()
    async with opened(dials) as presence:
        presence.on_sighting(OTHER, [ADDRESS])
        while not dials.began:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        await trio.sleep_until(dials.began[0] + at_s)
        dials.refused = False
        presence.on_mesh_change()
        presence.on_sighting(OTHER, [ADDRESS])
        changed_s = trio.current_time()
        await trio.sleep(TAKES_S + YIELD_S + 0.1)
        assert any(began >= changed_s for began in dials.began), "it counts as refused by a peer of the former mesh"
        assert not presence.refused()


@pytest.mark.parametrize("at_s", [0.1, 2.0, 4.9, 5.1])
async def test_at_whatever_moment_of_a_dial_our_network_is_another_the_peer_is_dialled_soon(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    dials = Dials()
    dials.refused, dials.takes_s = False, 60.0
    async with opened(dials) as presence:
        presence.on_sighting(OTHER, [ADDRESS])
        await trio.sleep(300)  # it fails again and again
        count = len(dials.began)
        while len(dials.began) == count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        await trio.sleep_until(dials.began[-1] + at_s)
        presence.on_network_change()
        changed_s, count = trio.current_time(), len(dials.began)
        while len(dials.began) == count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        assert dials.began[count] - changed_s <= PATIENCE_S + SPREAD_S + 0.1 < DIAL_DEADLINE_S
