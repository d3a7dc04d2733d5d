"""The UDP port on the real network stack: ports that are taken, families, addresses that come and go."""

import errno
import socket

import pytest
import trio

from meshmax.base.errors import ConfigError
from meshmax.net import datagrams as module
from meshmax.net.datagrams import open_datagrams

pytestmark = pytest.mark.loopback

DHT = range(0xD8, 0xD9)


async def test_a_port_that_is_taken_means_the_next_free_one_for_every_host() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
        taken.bind(("::1", 0))
        port = taken.getsockname()[1]
        async with open_datagrams([("127.0.0.1", port), ("::1", port)]) as ours:
            (_, four), (_, six) = ours.addresses
            assert four == six
            assert port < four < port + 64


async def test_any_free_port_is_the_same_for_both_families() -> None:
    async with open_datagrams([("127.0.0.1", 0), ("::1", 0)]) as ours:
        (_, four), (_, six) = ours.addresses
        assert four == six > 0


async def test_both_families_answer_on_their_own_socket() -> None:
    async with (
        open_datagrams([("127.0.0.1", 0), ("::1", 0)]) as ours,
        open_datagrams([("::", 0), ("0.0.0.0", 0)]) as other,
    ):
        came, send = trio.open_memory_channel[tuple[str, int]](2)[::-1]
        ours.receive(DHT, lambda _, sender: send.send_nowait(sender))
        port = other.addresses[0][1]
        with trio.fail_after(60):
            for address in ours.addresses:
                other.send(b"\xd8", address)
                assert await came.receive() == (address[0], port)


async def test_a_host_that_is_not_here_is_left_out_unless_it_is_the_only_one() -> None:
    async with open_datagrams([("192.0.2.77", 0), ("127.0.0.1", 0)]) as ours:
        assert [ip for ip, _ in ours.addresses] == ["127.0.0.1"]
    with pytest.raises(ConfigError, match="cannot bind UDP port"):
        async with open_datagrams([("192.0.2.77", 0)]):
            pass


async def test_a_name_of_this_machine_is_bound_by_its_numbers() -> None:
    async with open_datagrams([("localhost", 0)]) as ours:
        assert "127.0.0.1" in [ip for ip, _ in ours.addresses]


async def test_after_the_end_the_port_is_free_again() -> None:
    async with open_datagrams([("127.0.0.1", 0)]) as ours:
        address = ours.addresses[0]
    async with open_datagrams([address]) as again:
        assert again.addresses == (address,)


async def test_a_socket_whose_address_has_left_is_bound_again_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BIND_AGAIN_S", 0.01)
    here = True
    bind = module._bound_socket

    def bound_socket(host: str, port: int) -> socket.socket:
        if not here:
            raise OSError(errno.EADDRNOTAVAIL, "not here")
        return bind(host, port)

    monkeypatch.setattr(module, "_bound_socket", bound_socket)
    async with open_datagrams([("127.0.0.1", 0)]) as ours, open_datagrams([("127.0.0.1", 0)]) as other:
        came, send = trio.open_memory_channel[bytes](2)[::-1]
        ours.receive(DHT, lambda data, _: send.send_nowait(data))
        address = ours.addresses[0]
        here = False
        # A source address of another network is what the kernel refuses like one that has left.
        ours.send(b"\xd8", ("203.0.113.1", 9))
        await trio.sleep(0.05)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(address)  # ours has let go of it
        here = True
        with trio.fail_after(60), trio.CancelScope() as sending:
            async with trio.open_nursery() as nursery:

                async def send_often() -> None:
                    while True:
                        other.send(b"\xd8back", address)
                        await trio.sleep(0.02)

                nursery.start_soon(send_often)
                assert await came.receive() == b"\xd8back"
                sending.cancel()
