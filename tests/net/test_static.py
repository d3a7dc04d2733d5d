"""Addresses that a person gave."""

import pytest
import trio
import trio.testing

from meshmax.base.errors import ConfigError
from meshmax.base.ids import peer_id_of
from meshmax.net.static import REPEAT_S, Static, parse_join
from meshmax.ports import Sighting

PEER = peer_id_of(bytes(32))


def test_a_join_address_names_where_and_who() -> None:
    assert parse_join(f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}") == (PEER, f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.1:11435",
        "/ip4/10.0.0.1/tcp/1",
        "/ip4/10.0.0.1/tcp/1/p2p/nobody",
        f"x/p2p/{PEER}",
        f"/ip4/10.0.0/tcp/1/p2p/{PEER}",
        f"/ip4/10.0.0.1/tcp/70000/p2p/{PEER}",
        f"/ip4/10.0.0.1/udp/1/quic-v1/p2p/{PEER}",
    ],
)
def test_what_names_no_peer_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="copy one from `meshmax status`"):
        Static([text])


async def test_it_is_said_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    send, receive = trio.open_memory_channel[Sighting](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Static([f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}"]).run, send)
        first, second = await receive.receive(), await receive.receive()
        nursery.cancel_scope.cancel()
    assert first == second
    assert trio.current_time() >= REPEAT_S


async def test_without_addresses_it_ends() -> None:
    send, _ = trio.open_memory_channel[Sighting](0)
    await Static([]).run(send)


@pytest.mark.parametrize("at_s", [0.05, 0.5, 1.45, 1.55, 3.0])
async def test_at_whatever_moment_it_is_to_look_again_all_are_named_again_at_once(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    addresses = [f"/ip4/10.0.0.1/tcp/1/p2p/{peer_id_of(bytes([nth]) * 32)}" for nth in range(16)]
    rung = Static(addresses)
    send, receive = trio.open_memory_channel[Sighting](0)
    told: list[float] = []

    async def read() -> None:
        async for _ in receive:
            told.append(trio.current_time())
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rung.run, send)
        nursery.start_soon(read)
        began = trio.current_time()
        await trio.sleep(at_s)
        rung.look_again()
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert len([at for at in told if at >= began + at_s]) >= len(addresses)
