"""Two data channels that meet on this machine's own interface; ICE never offers loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshmax.net.addresses import running_addresses
from meshmax.net.ice import IceChannels, IceStream, open_channels
from meshmax.ports import ChannelEnd

PROMPTLY_S = 60.0  # on busy cores; the first time aiortc is imported


@asynccontextmanager
async def site() -> AsyncIterator[IceChannels]:
    """Channels over all interfaces of this machine; none may be left when the block ends. Skips where there is none."""
    if not running_addresses():
        pytest.skip("ICE takes an interface besides loopback")
    with trio.fail_after(60):
        async with open_channels(running_addresses) as channels:
            assert isinstance(channels, IceChannels)
            yield channels
            await until_empty(channels)


async def until_empty(channels: IceChannels, within_s: float = PROMPTLY_S) -> None:
    """Until every channel has ended."""
    with trio.fail_after(within_s):
        while channels.count:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)


async def meet(one: ChannelEnd, other: ChannelEnd) -> None:
    """Exchange their SDPs; ``one`` offers."""
    await one.accept(await other.answer(await one.offer()))


@asynccontextmanager
async def pair(channels: IceChannels) -> AsyncIterator[tuple[IceStream, IceStream]]:
    """Both ends of an open channel, closed at the end."""
    async with channels.open_channel([]) as one, channels.open_channel([]) as other:
        await meet(one, other)
        with trio.fail_after(PROMPTLY_S):
            ends = await one.connected(), await other.connected()
    first, second = ends
    assert isinstance(first, IceStream)
    assert isinstance(second, IceStream)
    try:
        yield first, second
    finally:
        first.close()
        second.close()


async def read(stream: IceStream, n_bytes: int) -> bytes:
    """Exactly so many, or fewer at the end."""
    data = bytearray()
    while len(data) < n_bytes and (some := await stream.receive_some(n_bytes - len(data))):
        data += some
    return bytes(data)
