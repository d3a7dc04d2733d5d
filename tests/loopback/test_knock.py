"""Knocking at real ports of this machine."""

import socket

import pytest
import trio

from meshmax.net.knock import knock

pytestmark = pytest.mark.loopback


@pytest.mark.parametrize(("family", "ip"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_an_open_port_is_told_from_a_closed_one(family: socket.AddressFamily, ip: str) -> None:
    with socket.socket(family) as listener:
        listener.bind((ip, 0))
        port = listener.getsockname()[1]
        assert await knock(ip, port) == "refused"
        listener.listen()
        assert await knock(ip, port) == "open"


async def test_what_is_no_address_is_unreachable() -> None:
    assert await knock("nowhere.invalid", 80) == "unreachable"
    assert await knock("fe80::1%nosuch0", 80) == "unreachable"


async def test_a_port_that_says_nothing_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshmax.net.knock.KNOCK_TIMEOUT_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        held = [socket.socket() for _ in range(4)]  # a full backlog lets no more in, and says nothing
        for each in held:
            each.setblocking(False)
            each.connect_ex(address)
        with trio.fail_after(60):
            assert await knock(*address) == "silent"
        for each in held:
            each.close()
