"""The real swarm on real sockets: what only the kernel can show, and the bounds on strangers."""

import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import trio

from meshmax.base.errors import ConfigError, ConnectError
from meshmax.net import limits
from meshmax.net.addresses import is_lan_address
from meshmax.net.swarm import open_swarm
from meshmax.testing.memory_swarm import SeededSigner

pytestmark = pytest.mark.loopback
KEYS = [SeededSigner(seed).private_bytes for seed in range(1, 5)]


def port_of(swarm: Any) -> int:
    return int(swarm.addresses[0].split("/")[4])


async def test_a_port_that_is_taken_means_the_next_free_one() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a:
        async with open_swarm(KEYS[1], [("127.0.0.1", port_of(a))]) as b:
            assert port_of(a) < port_of(b) < port_of(a) + 64


async def test_listening_on_every_interface_advertises_concrete_addresses_loopback_last() -> None:
    async with open_swarm(KEYS[0], [("0.0.0.0", 0), ("::", 0)]) as a:
        hosts = [address.split("/")[2] for address in a.addresses]
        assert "0.0.0.0" not in hosts
        assert "::" not in hosts
        assert "127.0.0.1" in hosts
        assert hosts.index("127.0.0.1") >= len(
            [host for host in hosts if not host.startswith("127.") and host != "::1"]
        )


async def test_an_address_that_cannot_be_bound_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        async with open_swarm(KEYS[0], [("192.0.2.1", 0)]):
            pass


async def test_who_is_not_allowed_gets_no_byte_and_is_not_dialled() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)], allow=lambda ip: False) as a:
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        with trio.fail_after(2):
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some(100) == b""
        await stream.aclose()
        async with open_swarm(KEYS[1], [("127.0.0.1", 0)], allow=is_lan_address) as b:
            with pytest.raises(ConnectError, match="does not connect to that address"):
                await a.dial(b.peer_id, b.addresses)


@pytest.mark.parametrize("security", [b"/plaintext/2.0.0", b"/secio/1.0.0", b"/tls/1.0.0"])
async def test_only_noise_is_spoken(security: bytes) -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a:
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        for line in (b"/multistream/1.0.0", security):
            await stream.send_all(bytes([len(line) + 1]) + line + b"\n")
        answer = b""
        with trio.fail_after(5):
            while len(answer) < 24:
                part = await stream.receive_some(100)
                assert part
                answer += part
        assert answer == b"\x13/multistream/1.0.0\n\x03na\n"
        await stream.aclose()


async def test_a_flood_of_half_open_dials_stays_within_bounds_and_honest_peers_get_in() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a, open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b:
        tasks_before = trio.lowlevel.current_statistics().tasks_living
        sockets: list[trio.SocketStream] = []
        worst = 0

        async def flood() -> None:
            for _ in range(400):
                with trio.move_on_after(0.2):
                    sockets.append(await trio.open_tcp_stream("127.0.0.1", port_of(a)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await trio.sleep(0.3)
            with trio.fail_after(10):
                while True:
                    worst = max(worst, a.door.half_open)
                    try:
                        await b.dial(a.peer_id, a.addresses)
                        break
                    except ConnectError:
                        continue
            worst = max(worst, a.door.half_open)
            nursery.cancel_scope.cancel()
        assert limits.MAX_HALF_OPEN_PER_IP // 2 < worst <= limits.MAX_HALF_OPEN
        assert trio.lowlevel.current_statistics().tasks_living - tasks_before < 12 * limits.MAX_HALF_OPEN
        for socket in sockets:
            await socket.aclose()
        with trio.fail_after(limits.HANDSHAKE_TIMEOUT_S + 2):
            while True:
                await trio.sleep(0.05)
                if not a.door.half_open:
                    break
        assert b.peer_id in a.connections()


async def test_a_dial_costs_no_artificial_delay() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a, open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b:
        fastest_s = 1.0
        for _ in range(5):
            started_s = trio.current_time()
            await a.dial(b.peer_id, b.addresses)
            fastest_s = min(fastest_s, trio.current_time() - started_s)
            await a.disconnect(b.peer_id)
            await trio.sleep(0.05)
        assert fastest_s < 0.2  # the library's own way takes a quarter of a second


def test_importing_the_swarm_does_not_import_the_library() -> None:
    code = "import sys, meshmax.net.swarm, meshmax.net.mdns; sys.exit('libp2p' in sys.modules or 'zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


def test_the_library_writes_nothing_to_the_terminal() -> None:
    code = """
import trio, logging
from meshmax.net.swarm import open_swarm
async def main():
    async with open_swarm(bytes(31) + b"a", [("127.0.0.1", 0)]) as a:
        async with open_swarm(bytes(31) + b"b", [("127.0.0.1", 0)]) as b:
            await a.dial(b.peer_id, b.addresses)
            logging.getLogger("libp2p.network.swarm").error("noise")
            logging.warning("noise")
        await trio.sleep(0.3)
trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
