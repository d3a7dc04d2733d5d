"""The networks on which the contract suites of swarms run: in memory, on a simulated cable, on loopback."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from meshmax.net import limits
from meshmax.net.swarm import open_swarm
from meshmax.net.tcp import TcpTransport
from meshmax.ports import Admission, ByteStream, Swarm
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.testing.memory_transport import MemoryTransport, MemoryWires
from meshmax.testing.sim_network import SimNetwork


class Lan(Protocol):
    dead: str  # an address at which nobody listens
    patience: float  # by how much longer anything may take here than on an idle machine

    def open(
        self, seed: int, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AbstractAsyncContextManager[Swarm]: ...

    async def send_garbage(self, address: str, data: bytes) -> None: ...

    async def pair(self) -> tuple[ByteStream, ByteStream]:
        """The two ends of one connection on which nothing was said yet."""
        ...


async def _pair(wires: MemoryWires) -> tuple[ByteStream, ByteStream]:
    near, far = wires.attach(), wires.attach()
    listener = await far.listen(far.ip, 0)
    leading = await near.connect(*listener.local)
    following = await listener.accept()
    listener.close()
    return leading, following


class MemoryLan:
    dead = "/memory/9999"
    patience = 1.0

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.wires = MemoryWires()

    def open(
        self, seed: int, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AbstractAsyncContextManager[Swarm]:
        return self.network.open_swarm(SeededSigner(seed), admission, max_guests)

    async def send_garbage(self, address: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def pair(self) -> tuple[ByteStream, ByteStream]:
        return await _pair(self.wires)


class SimLan:
    dead = "/ip4/10.0.0.250/tcp/1"
    patience = 1.0

    def __init__(self) -> None:
        self.network = SimNetwork()

    def open(
        self, seed: int, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AbstractAsyncContextManager[Swarm]:
        return self.network.open_swarm(SeededSigner(seed).private_bytes, admission, max_guests)

    async def send_garbage(self, address: str, data: bytes) -> None:
        await _send_and_wait(await MemoryTransport(self.network.wires, "10.0.9.9").connect(*_host_port(address)), data)

    async def pair(self) -> tuple[ByteStream, ByteStream]:
        return await _pair(self.network.wires)


class LoopbackLan:
    dead = "/ip4/127.0.0.1/tcp/1"
    patience = 20.0  # real time passes, on a machine that may be slow

    def open(
        self, seed: int, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AbstractAsyncContextManager[Swarm]:
        private_bytes = SeededSigner(seed).private_bytes
        return open_swarm(private_bytes, [("127.0.0.1", 0)], admission=admission, max_guests=max_guests)

    async def send_garbage(self, address: str, data: bytes) -> None:
        await _send_and_wait(await trio.open_tcp_stream(*_host_port(address)), data)

    async def pair(self) -> tuple[ByteStream, ByteStream]:
        listener = await TcpTransport().listen("127.0.0.1", 0)
        leading = await TcpTransport().connect(*listener.local)
        following = await listener.accept()
        listener.close()
        return leading, following


def _host_port(address: str) -> tuple[str, int]:
    return address.split("/")[2], int(address.split("/")[4])


async def _send_and_wait(stream: Any, data: bytes) -> None:
    with trio.fail_after(2 * limits.HANDSHAKE_TIMEOUT_S):
        try:
            await stream.send_all(data)
            while await stream.receive_some(4096):
                pass
        except trio.BrokenResourceError:
            pass
    if isinstance(stream, trio.SocketStream):
        await stream.aclose()
    else:
        stream.close()
