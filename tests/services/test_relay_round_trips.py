"""How many round trips it takes to be connected over a relay: real libp2p swarms in virtual time."""

from typing import Any, Final

import pytest
import trio

from tests.services.relay_site import open_site, until

ROUND_TRIP_S: Final = 0.02  # of the site, between any two hosts; over the relay it is twice as long


async def test_a_circuit_takes_a_round_trip_to_the_relay_one_beyond_it_and_one_over_it_each_for_noise_and_admission(
    autojump_clock: Any,
) -> None:
    async with open_site() as site:
        await site.relay()
        a, b = await site.member(), await site.member()
        await until(lambda: a.client.relays and b.client.relays)
        begun: list[float] = []
        a.client.on_circuit = b.client.on_circuit = lambda: begun.append(trio.current_time())
        began_s = trio.current_time()
        await a.client.connect(b.peer_id, b.client.addresses[0])
        assert trio.current_time() - began_s == pytest.approx((1 + 1 + 2 * 2) * ROUND_TRIP_S, abs=0.001)
        assert begun == [began_s, pytest.approx(began_s + ROUND_TRIP_S, abs=0.001)]  # what an attempt needs is prepared
