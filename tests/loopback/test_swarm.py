"""The real swarm on real sockets: what only the kernel can show, and the bounds on strangers."""

import os
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
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
        with trio.fail_after(60):
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
        with trio.fail_after(60):
            while len(answer) < 24:
                part = await stream.receive_some(100)
                assert part
                answer += part
        assert answer == b"\x13/multistream/1.0.0\n\x03na\n"
        await stream.aclose()


async def flood(port: int, count: int, at_once: int) -> None:
    """Dial ``port`` ``count`` times, ``at_once`` together, and say nothing."""
    left = count

    async def dial() -> None:
        nonlocal left
        held: deque[trio.SocketStream] = deque()
        while left > 0:
            left -= 1
            with trio.move_on_after(2.0), suppress(OSError):
                held.append(await trio.open_tcp_stream("127.0.0.1", port))
            if len(held) > 8:  # dropped there long ago
                await held.popleft().aclose()
        for stream in held:
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(dial)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


async def test_a_flood_of_half_open_dials_stays_within_bounds_and_honest_peers_get_in() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a, open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b:
        tasks_before, files_before = trio.lowlevel.current_statistics().tasks_living, open_files()
        most_half_open = most_tasks = honest = 0
        flooded = trio.Event()

        async def watch() -> None:
            nonlocal most_half_open, most_tasks
            while not flooded.is_set():
                most_half_open = max(most_half_open, a.door.half_open)
                most_tasks = max(most_tasks, trio.lowlevel.current_statistics().tasks_living - tasks_before)
                await trio.sleep(0.01)

        async def visit() -> None:
            nonlocal honest
            while not flooded.is_set():
                with suppress(ConnectError):
                    await b.dial(a.peer_id, a.addresses)
                    honest += 1
                    await a.disconnect(b.peer_id)
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            nursery.start_soon(visit)
            await flood(port_of(a), 1_500, at_once=100)  # ten thousand: tests/net, in simulated time
            flooded.set()
        assert limits.MAX_HALF_OPEN_PER_IP // 2 < most_half_open <= limits.MAX_HALF_OPEN
        assert most_tasks < 12 * limits.MAX_HALF_OPEN
        assert honest >= 1
        with trio.fail_after(limits.HANDSHAKE_TIMEOUT_S + 2):
            while a.door.half_open:  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.05)
        await b.dial(a.peer_id, a.addresses)
        assert open_files() - files_before < 50


async def test_a_dial_costs_no_artificial_delay() -> None:
    async with open_swarm(KEYS[0], [("127.0.0.1", 0)]) as a, open_swarm(KEYS[1], [("127.0.0.1", 0)]) as b:
        fastest_s = 1.0
        for _ in range(100):  # of which one finds the machine idle enough
            started_s = trio.current_time()
            await a.dial(b.peer_id, b.addresses)
            fastest_s = min(fastest_s, trio.current_time() - started_s)
            await a.disconnect(b.peer_id)
            if fastest_s < 0.2:
                break
            await trio.sleep(0.05)
        assert fastest_s < 0.2  # the library's own way takes a quarter of a second


def test_importing_the_swarm_does_not_import_the_library() -> None:
    code = "import sys, meshmax.net.swarm, meshmax.net.mdns; sys.exit('libp2p' in sys.modules or 'zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


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
