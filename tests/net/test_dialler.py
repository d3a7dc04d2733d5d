"""Which addresses a dial tries; dialling itself is in the contract suite of swarms."""

from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError
from meshmax.net.swarm import open_swarm
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.memory_transport import MemoryBytes, MemoryTransport, MemoryWires
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


class NamedTransport(MemoryTransport):
    """Names are others' to point where they like."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        super().__init__(MemoryWires(), "10.0.0.1")
        self.names = names
        self.reached: list[str] = []

    async def resolve(self, host: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        return self.names[host]

    async def connect(self, ip: str, port: int) -> MemoryBytes:
        self.reached.append(ip)
        return await super().connect(ip, port)


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
async def test_a_name_that_leads_to_this_machine_is_not_followed(autojump_clock: Any, ip: str) -> None:
    peer = SeededSigner(2).peer_id
    transport = NamedTransport({"a.test": [ip], "b.test": [ip, "10.0.0.9"]})
    async with open_swarm(SeededSigner(1).private_bytes, [("0.0.0.0", 11435)], transport=transport) as swarm:
        with pytest.raises(ConnectError):
            await swarm.dial(peer, ["/dns4/a.test/tcp/11434"])
        assert transport.reached == []
        with pytest.raises(ConnectError):
            await swarm.dial(peer, ["/dns/b.test/tcp/11434"])
        assert transport.reached == ["10.0.0.9"]


async def test_a_name_that_says_that_it_is_this_machine_is_followed(autojump_clock: Any) -> None:
    transport = NamedTransport({"localhost": ["127.0.0.1"]})
    async with open_swarm(SeededSigner(1).private_bytes, [("0.0.0.0", 11435)], transport=transport) as swarm:
        with pytest.raises(ConnectError):
            await swarm.dial(SeededSigner(2).peer_id, ["/dns4/localhost/tcp/11434"])
        assert transport.reached == ["127.0.0.1"]
