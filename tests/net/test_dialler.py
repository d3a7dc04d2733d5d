"""Which addresses a dial tries; dialling itself is in the contract suite of swarms."""

from typing import Any

import pytest

from meshmax.base.errors import ConnectError
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import SimNetwork

RELAYED = f"/ip4/203.0.113.1/tcp/1/p2p/{SeededSigner(9).peer_id}/p2p-circuit"


async def test_addresses_over_relays_are_passed_over(autojump_clock: Any) -> None:
    network = SimNetwork()
    async with (
        network.open_swarm(SeededSigner(1).private_bytes) as a,
        network.open_swarm(SeededSigner(2).private_bytes) as b,
    ):
        relayed = f"{RELAYED}/p2p/{b.peer_id}"
        with pytest.raises(ConnectError, match="over relays") as caught:
            await a.dial(b.peer_id, [relayed, RELAYED])
        assert caught.value.attempts == ()
        dead = "/ip4/10.0.0.250/tcp/1"
        with pytest.raises(ConnectError) as caught:
            await a.dial(b.peer_id, [*[relayed] * 20, dead])
        assert [attempt[0] for attempt in caught.value.attempts] == [dead]
        await a.dial(b.peer_id, [relayed, *b.addresses])
        assert b.peer_id in a.connections()
