"""Relays, and members that can only meet over them: real libp2p swarms over an in-memory cable, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import trio

from meshmax.base.ids import PeerId
from meshmax.core.relay import Relay, RelayLimits
from meshmax.core.reservations import RelayPlace
from meshmax.net.swarm import LibrarySwarm, open_swarm
from meshmax.ports import Stream
from meshmax.services.relay_client import RelayClient, open_relay_client
from meshmax.services.relay_server import RelayServer, open_relay_server
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.memory_transport import MemoryTransport, MemoryWires
from meshmax.wire.protocols import INFER

UNIX_S = 1_700_000_000.0
PORT = 11435


class SameWord:
    """Members say the same word."""

    def __init__(self, word: bytes = b"ours") -> None:
        self._word = word

    async def admit(self, stream: Stream, direction: str) -> None:
        from meshmax.base.errors import NotAMember

        await stream.send_all(self._word)
        if await stream.receive_some(4) != self._word:
            raise NotAMember("another mesh")

    def check(self, peer_id: PeerId, protocol: str) -> None:
        pass


class Host:
    """One swarm on a host of its own."""

    def __init__(self, swarm: LibrarySwarm, transport: MemoryTransport) -> None:
        self.swarm, self.ip = swarm, transport.ip
        self.peer_id = swarm.peer_id
        self.client: RelayClient
        self.server: RelayServer

        self.serves = True  # as a relay, for members

    @property
    def core(self) -> Relay:
        assert self.server.relay is not None
        return self.server.relay

    @property
    def place(self) -> RelayPlace:
        return RelayPlace(self.peer_id, (f"/ip4/{self.ip}/tcp/{PORT}",))


class RelaySite:
    """Members cannot reach each other but over relays."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.wires = MemoryWires(0.01)
        self._enter = stack.enter_async_context
        self.relays: list[Host] = []
        self.members: list[Host] = []
        self.wanted = True

    async def _host(self, seed: int, admission: object) -> Host:
        transport = self.wires.attach()
        opened = open_swarm(
            SeededSigner(seed).private_bytes,
            [("0.0.0.0", PORT)],
            transport=transport,
            admission=admission,  # type: ignore[arg-type]
        )
        return Host(await self._enter(opened), transport)

    async def relay(self, limits: RelayLimits = RelayLimits()) -> Host:  # noqa: B008  frozen
        host = await self._host(100 + len(self.relays), NoMesh())
        host.server = await self._enter(open_relay_server(host.swarm, self.unix_now, Relay(limits)))
        self.relays.append(host)
        return host

    async def members_relay(self) -> Host:
        """A member that relays for members only."""
        host = await self._host(150, SameWord())
        opened = open_relay_server(host.swarm, self.unix_now, strangers=False, members=lambda: host.serves)
        host.server = await self._enter(opened)
        return host

    async def member(
        self, places: Sequence[Host] | None = None, admission: object = None, *, as_member: bool = False
    ) -> Host:
        """One that may keep places at ``places`` (None: at every relay)."""
        host = await self._host(1 + len(self.members), admission or SameWord())
        for other in self.members:
            self.wires.partition(host.ip, other.ip)
        host.swarm.serve(INFER, echo)

        def at() -> list[RelayPlace]:
            chosen = self.relays if places is None else places
            return [msgspec.structs.replace(relay.place, member=as_member) for relay in chosen]

        host.client = await self._enter(
            open_relay_client(
                host.swarm, at, lambda: self.wanted, self.unix_now, random.Random(len(self.members)), self.ways
            )
        )
        self.members.append(host)
        return host

    def ways(self, peer_id: PeerId) -> tuple[str, ...]:
        return next(member.client.addresses for member in self.members if member.peer_id == peer_id)

    def unix_now(self) -> float:
        return UNIX_S + trio.current_time()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


@asynccontextmanager
async def open_site() -> AsyncIterator[RelaySite]:
    """A site; what a test raises comes out as it is, out of all nurseries' groups."""
    try:
        with trio.fail_after(20_000):
            async with AsyncExitStack() as stack:
                yield RelaySite(stack)
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        raise leaf from None  # noqa: ASYNC123  a test says what it expects without the nurseries around it


async def until(condition: object, within_s: float = 60.0) -> float:
    """Virtual seconds until ``condition()`` holds."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await trio.sleep(0.05)
    return trio.current_time() - began


async def exchange(a: Host, b: Host, data: bytes = b"hello") -> bytes:
    """What b says back."""
    stream = await a.swarm.open_stream(b.peer_id, INFER)
    await stream.send_all(data)
    got = b""
    while len(got) < len(data):
        part = await stream.receive_some(65536)
        assert part
        got += part
    await stream.aclose()
    return got
