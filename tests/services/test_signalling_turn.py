"""TURN servers by name: whoever needs their addresses has them, at whatever moment of the look-up."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from meshmax.base.traversal import TurnServer
from meshmax.services import signalling as module
from meshmax.testing.memory_traversal import MemoryNats
from tests.services.test_signalling import two

LOOK_UP_S = 2.0
TURN = (TurnServer("turn:turn.example:443?transport=tcp"),)


@pytest.mark.parametrize("after_s", [0.0, 1.0, 1.99, 2.01])
async def test_at_whatever_moment_of_the_look_up_of_turn_servers_they_are_needed_they_are_known(
    after_s: float, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def resolve(servers: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        nonlocal asked
        asked += 1
        await trio.sleep(LOOK_UP_S)
        return tuple(("198.51.100.9", port) for _, port in servers)

    monkeypatch.setattr(module, "resolve_servers", resolve)
    async with two(MemoryNats(), TURN) as (a, _), trio.open_nursery() as nursery:
        nursery.start_soon(a.signalling._look_up_relays)
        await trio.sleep(after_s)
        await a.signalling._look_up_relays()
        assert a.signalling._relay_ips == {"198.51.100.9"}
        assert asked == 1
