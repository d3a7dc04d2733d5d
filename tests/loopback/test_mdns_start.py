"""mDNS that cannot start leaves nothing behind."""

import os

import pytest

from meshmax.net.asyncio_bridge import make_in_asyncio, open_asyncio
from meshmax.net.mdns_library import make_zeroconf
from meshmax.net.multicast import Way

pytestmark = pytest.mark.loopback


async def test_a_start_that_fails_leaves_no_socket_open() -> None:
    async with open_asyncio():
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            with pytest.raises((OSError, RuntimeError)):
                # An address for documentation (RFC 5737), which no interface has.
                await make_in_asyncio(lambda: make_zeroconf([Way("eth9", 9, "203.0.113.7")]))
        assert len(os.listdir("/dev/fd")) <= before  # what earlier tests left may be collected meanwhile
