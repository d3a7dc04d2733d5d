"""What a member takes for a renewed certificate, over memberships that run."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import PeerGone
from meshmax.base.membership import SCOPES
from meshmax.core.chains import CERTIFICATE_S, CLOCK_TOLERANCE_S
from meshmax.ports import Stream
from meshmax.wire.protocols import INFER
from tests.services.test_membership import NAME, open_place

Clock = trio.testing.MockClock
DAY_S = 86400


async def jump(clock: Clock, seconds: float) -> None:
    """Let time go by at once, when what is under way has ended."""
    await trio.sleep(1)
    clock.jump(seconds)
    await trio.sleep(1)


async def test_admins_whose_root_is_away_do_not_come_to_depend_on_each_other_for_nothing(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (r, r_swarm), (a, a_swarm), (b, b_swarm) = [await place.peer(seed) for seed in (1, 2, 3)]
        await r.create(NAME)
        for one in (a, b):
            await one.join(await r.ticket(SCOPES, 3600, 1))
        before = a.standing.chain, b.standing.chain
        place.network.freeze(r_swarm.peer_id)
        await a_swarm.dial(b_swarm.peer_id, b_swarm.addresses)
        await jump(autojump_clock, 20 * DAY_S)
        await trio.sleep(2000)
        assert (a.standing.chain, b.standing.chain) == before
        place.network.thaw(r_swarm.peer_id)
        for swarm in (a_swarm, b_swarm):
            await swarm.disconnect(r_swarm.peer_id)
            await swarm.dial(r_swarm.peer_id, r_swarm.addresses)
        await trio.sleep(2000)
        for one, old in zip((a, b), before, strict=True):
            assert one.standing.chain != old
            assert len(one.standing.chain) == 1
            assert one.view().expires_at_s == pytest.approx(1e9 + trio.current_time() + CERTIFICATE_S, abs=DAY_S)


async def test_a_member_is_renewed_by_an_admin_whose_own_certificate_lasts_longer(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (r, r_swarm), (a, a_swarm), (b, b_swarm) = [await place.peer(seed) for seed in (1, 2, 3)]
        await r.create(NAME)
        await b.join(await r.ticket(("infer",), 3600, 1))
        await jump(autojump_clock, 5 * DAY_S)
        await a.join(await r.ticket(SCOPES, 3600, 1))
        place.network.freeze(r_swarm.peer_id)
        await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
        await jump(autojump_clock, 12 * DAY_S)
        await trio.sleep(2000)
        assert len(b.standing.chain) == 2
        assert b.view().expires_at_s == a.view().expires_at_s
        assert b.view().scopes == ("infer",)


async def test_a_live_connection_ends_with_the_certificate_that_it_stands_on(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (r, r_swarm), (a, a_swarm), (b, b_swarm) = [await place.peer(seed) for seed in (1, 2, 3)]
        await r.create(NAME)
        for one in (a, b):
            await one.join(await r.ticket(("infer",), 3600, 1))
        place.network.freeze(r_swarm.peer_id)
        await a_swarm.dial(b_swarm.peer_id, b_swarm.addresses)

        async def talk(stream: Stream) -> None:
            await stream.send_all(b"x")
            await trio.sleep_forever()

        b_swarm.serve(INFER, talk)
        stream = await a_swarm.open_stream(b_swarm.peer_id, INFER)
        assert await stream.receive_some(1) == b"x"
        await jump(autojump_clock, CERTIFICATE_S - 60)
        assert b_swarm.peer_id in a_swarm.connections()
        await trio.sleep(CLOCK_TOLERANCE_S)  # clocks may differ by so much
        assert b_swarm.peer_id in a_swarm.connections()
        with trio.fail_after(2 * 60), pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert not {a_swarm.peer_id, b_swarm.peer_id} & {*a_swarm.connections(), *b_swarm.connections()}
        assert "expired" in a.view().problem
