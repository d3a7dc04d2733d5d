"""Punching in memory, for services above it: ports and data channels that meet, or do not, as a test says.

`MemoryNats` decides nothing by itself: TCP connects two ports that run against each other's candidates, UDP two channels that
have each other's SDP, where the test lets them. Satisfies ports.Puncher and ports.Channels. NATs of known kinds, deciding by
packets, are testing.sim_nat's; swarms memory_swarm's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.traversal import PUNCH_TCP_S, Candidate, TurnServer
from meshmax.ports import ByteStream
from meshmax.testing.memory_transport import MemoryBytes, MemoryWires

OBSERVED_S: Final = 0.04  # until a port or channel knows its mapped address: two ways to an observer
OPEN_S: Final = 0.04  # until both ends have a stream: one round trip
_SDP: Final = """v=0
o=- 1 1 IN IP4 0.0.0.0
s=-
t=0 0
a=group:BUNDLE 0
m=application 9 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 0.0.0.0
a=mid:0
a=sctp-port:5000
a=ice-ufrag:{ufrag}
a=ice-pwd:passwordpasswordpassword
a=fingerprint:sha-256 {fingerprint}
a=setup:{setup}
a=candidate:1 1 udp 2130706431 {ip} {port} typ srflx
a=end-of-candidates
"""


class MemoryNats:
    """Where ports and channels of all sides meet. ``tcp``, ``udp``: does that get through at all?"""

    def __init__(self, tcp: bool = True, udp: bool = True) -> None:
        self.tcp, self.udp = tcp, udp
        self.wires = MemoryWires(0.02)
        self.numbers = 40_000
        self.running: dict[MemoryPunchPort, trio.MemorySendChannel[ByteStream]] = {}
        self.channels: dict[str, MemoryChannelEnd] = {}  # by ufrag
        self.packets: list[tuple[str, int]] = []  # whom anybody tried to reach
        self.open = 0  # ports and channels now
        self.ends: list[MemoryBytes] = []  # of all connections that were made

    def side(self, ip: str) -> MemorySide:
        """What one peer, seen at ``ip``, uses."""
        return MemorySide(self, ip)

    def pair(self, a: tuple[str, int], b: tuple[str, int]) -> tuple[MemoryBytes, MemoryBytes]:
        """A connection between two addresses: the end at each."""
        near, far = MemoryBytes(self.wires, a[0], b), MemoryBytes(self.wires, b[0], a)
        near.twin, far.twin = far, near
        self.ends += (near, far)
        return near, far


class MemorySide:
    """Satisfies ports.Puncher and ports.Channels."""

    def __init__(self, nats: MemoryNats, ip: str) -> None:
        self.nats, self.ip = nats, ip
        self.observers: list[tuple[str, int]] = []  # asked for last

    @asynccontextmanager
    async def open_port(self, observers: Sequence[tuple[str, int]]) -> AsyncIterator[MemoryPunchPort]:
        """See ports.Puncher."""
        self.observers = list(observers)
        self.nats.open += 1
        try:
            await trio.sleep(OBSERVED_S)
            self.nats.numbers += 1
            yield MemoryPunchPort(self.nats, self.ip, self.nats.numbers)
        finally:
            self.nats.open -= 1

    @asynccontextmanager
    async def open_channel(
        self, stun: Sequence[tuple[str, int]], turn: Sequence[TurnServer] = ()
    ) -> AsyncIterator[MemoryChannelEnd]:
        """See ports.Channels."""
        self.nats.open += 1
        self.nats.numbers += 1
        end = MemoryChannelEnd(self.nats, self.ip, self.nats.numbers, by_turn=bool(turn))
        try:
            yield end
        finally:
            self.nats.open -= 1
            self.nats.channels.pop(end.ufrag, None)


class MemoryPunchPort:
    """Satisfies ports.PunchPort."""

    def __init__(self, nats: MemoryNats, ip: str, port: int) -> None:
        self._nats, self.ip, self.port = nats, ip, port
        self.candidates: tuple[Candidate, ...] = (Candidate("srflx", "tcp", ip, port),)
        self.targets: tuple[Candidate, ...] = ()

    async def run(self, targets: Sequence[Candidate], found: trio.MemorySendChannel[ByteStream]) -> None:
        """See ports.PunchPort."""
        self.targets = tuple(targets)
        self._nats.packets += [(target.ip, target.port) for target in targets]
        self._nats.running[self] = found
        try:
            with trio.move_on_after(PUNCH_TCP_S) as scope:
                await self._meet(found)
                scope.deadline = trio.current_time() + 2 * OPEN_S
                await trio.sleep_forever()
        finally:
            del self._nats.running[self]

    async def _meet(self, found: trio.MemorySendChannel[ByteStream]) -> None:
        while True:
            for other, theirs in tuple(self._nats.running.items()):
                if other is not self and self._nats.tcp and self._aims_at(other) and other._aims_at(self):
                    await trio.sleep(OPEN_S)
                    ours, far = self._nats.pair((self.ip, self.port), (other.ip, other.port))
                    await _give(theirs, far)
                    await _give(found, ours)
                    return
            await trio.sleep(0.01)

    def _aims_at(self, other: MemoryPunchPort) -> bool:
        return (other.ip, other.port) in [(target.ip, target.port) for target in self.targets]


class MemoryChannelEnd:
    """Satisfies ports.ChannelEnd."""

    def __init__(self, nats: MemoryNats, ip: str, port: int, *, by_turn: bool) -> None:
        self._nats, self.ip, self.port, self._by_turn = nats, ip, port, by_turn
        self.ufrag = f"u{port:05}"
        self._other = ""
        self._made: ByteStream | None = None

    async def offer(self) -> str:
        """See ports.ChannelEnd."""
        return await self._describe("actpass")

    async def answer(self, offer: str) -> str:
        """See ports.ChannelEnd."""
        self._read(offer)
        return await self._describe("active")

    async def accept(self, answer: str) -> None:
        """See ports.ChannelEnd."""
        await trio.lowlevel.checkpoint()
        self._read(answer)

    async def connected(self) -> ByteStream:
        """See ports.ChannelEnd."""
        while self._made is None:
            other = self._nats.channels.get(self._other)
            if (self._nats.udp or self._by_turn) and other is not None and other._other == self.ufrag:
                await trio.sleep(OPEN_S)
                if self._made is None:  # the other may have been first
                    self._made, other._made = self._nats.pair((self.ip, self.port), (other.ip, other.port))
                break
            await trio.sleep(0.01)
        assert self._made is not None
        return self._made

    async def _describe(self, setup: str) -> str:
        await trio.sleep(OBSERVED_S)
        self._nats.channels[self.ufrag] = self
        fingerprint = ":".join(["AB"] * 32)
        return _SDP.format(ufrag=self.ufrag, fingerprint=fingerprint, setup=setup, ip=self.ip, port=self.port)

    def _read(self, sdp: str) -> None:
        lines = [line for line in sdp.splitlines() if line.startswith("a=ice-ufrag:")]
        if not lines:
            raise RemoteProtocolError("the SDP has no ICE credentials")
        self._other = lines[0].partition(":")[2]
        candidates = [line.split() for line in sdp.splitlines() if line.startswith("a=candidate:")]
        self._nats.packets += [(fields[4], int(fields[5])) for fields in candidates]
        if not candidates:
            self._other = ""


async def _give(found: trio.MemorySendChannel[ByteStream], stream: MemoryBytes) -> None:
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        await found.send(stream)
        return
    stream.close()
