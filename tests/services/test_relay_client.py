"""Peers behind relays, over real libp2p in virtual time: places, circuits, and each way in which a relay fails."""

from typing import Any

from tests.services.relay_site import exchange, open_site, until


async def test_two_that_cannot_reach_each_other_are_connected_over_a_relay(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a, b = await site.member(), await site.member()
        assert await until(lambda: b.client.relays) < 1
        assert b.client.addresses == (f"{relay.place.addresses[0]}/p2p/{relay.peer_id}/p2p-circuit/p2p/{b.peer_id}",)
        await a.client.connect(b.peer_id, b.client.addresses[0])
        assert await exchange(a, b) == b"hello"
        assert a.swarm.connections()[b.peer_id].path == "relay"
        assert await exchange(b, a) == b"hello"
        assert b.swarm.connections()[a.peer_id].address.endswith(f"/p2p/{relay.peer_id}/p2p-circuit")
