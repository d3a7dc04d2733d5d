"""What makes byte streams through NATs; the streams then go to Swarm.adopt, or become blob lanes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import trio

from meshmax.base.ids import PeerId
from meshmax.base.reachability import MappingProtocol
from meshmax.base.status import Path
from meshmax.base.traversal import Candidate, TurnServer
from meshmax.ports.net import ByteStream


class PunchPort(Protocol):
    """A local TCP port kept for one simultaneous open: its mapping at the NAT is held by a connection to an observer."""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Where the other side may meet us: host candidates, and the mapped address where an observer told it."""
        ...

    async def run(self, targets: Sequence[Candidate], found: trio.MemorySendChannel[ByteStream]) -> None:
        """Connect from this port to every target and accept on it at the same time, again and again for PUNCH_TCP_S.

        Each connection made goes to ``found``, whose reader owns it from then on and proves who is at its other end; what
        is sent to nobody is closed. Both sides start within half a round trip of each other. Cancelling closes all the rest.
        """
        ...


class Puncher(Protocol):
    """TCP simultaneous open."""

    def open_port(self, observers: Sequence[tuple[str, int]]) -> AbstractAsyncContextManager[PunchPort]:
        """A fresh port, ready within 1 s; ``observers`` are TCP observers (net.observer), the first that answers counts.

        None answering is no error: then there are host candidates only. Raises ConnectError: no port is to be had.
        """
        ...


class ChannelEnd(Protocol):
    """Our side of one data channel over UDP (ICE, DTLS, SCTP). One offer and one answer, in this order."""

    async def offer(self) -> str:
        """Our SDP, with all candidates that were gathered."""
        ...

    async def answer(self, offer: str) -> str:
        """Our SDP for the other's. Raises RemoteProtocolError."""
        ...

    async def accept(self, answer: str) -> None:
        """The other's SDP for ours. Raises RemoteProtocolError."""
        ...

    async def connected(self) -> ByteStream:
        """The open channel. Raises ConnectError. Deadlines are the caller's."""
        ...


class Channels(Protocol):
    """Data channels over UDP."""

    def open_channel(
        self, stun: Sequence[tuple[str, int]], turn: Sequence[TurnServer] = ()
    ) -> AbstractAsyncContextManager[ChannelEnd]:
        """One end. Leaving the block ends it, unless its stream was taken (`ChannelEnd.connected`), which then owns it.

        With ``turn`` only relayed candidates are gathered: ICE takes the first pair that works, so TURN would win over a
        direct path. Without ``stun`` only host candidates.
        """
        ...


class Relays(Protocol):
    """The relays (circuit v2) that keep a place for us, and the way over relays to others."""

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """At which we hold a place now."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Circuit multiaddrs by which members reach us over them, each ending in /p2p-circuit/p2p/<our PeerId>."""
        ...

    async def connect(self, peer_id: PeerId, relay: PeerId | str, *, guest: bool = False) -> None:
        """Connect to a peer over a relay: its PeerId where we know how to reach it, or a circuit multiaddr.

        ``guest`` as in `Swarm.dial`. Returns once the connection is admitted. Raises ConnectError, NotAMember. Deadlines are the
        caller's.
        """
        ...

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` when `relays` or `addresses` are others. It must not block, and is kept for ever."""
        ...


class Signals(Protocol):
    """Attempts at a better path to a peer with whom there is a connection.

    ``on_lane_stream`` gets our end of each connection that a peer opened for a lane, and owns it; None: there are no lanes.
    """

    on_lane_stream: Callable[[ByteStream], Awaitable[None]] | None

    async def traverse(self, peer_id: PeerId) -> Path:
        """One attempt, every method side by side; the path that was made and adopted. Raises ConnectError with each that failed.

        It has deadlines of its own (base.traversal). Cancelling it ends the attempt on both sides.
        """
        ...

    async def open_lane_stream(self, peer_id: PeerId) -> ByteStream:
        """A TCP connection to the peer for a lane, whose `on_lane_stream` gets the other end; the lane proves whose it is.

        It has deadlines of its own. Raises ConnectError, Busy.
        """
        ...


class PortMapper(Protocol):
    """One way to have a router forward ports: NAT-PMP (RFC 6886) or UPnP (IGD). Answers are the router's word alone."""

    @property
    def name(self) -> Literal["upnp", "nat-pmp"]:
        """As in PortMapping.by."""
        ...

    async def find(self) -> str:
        """The external IP address of the router that will be asked from now on. Raises ConnectError: none speaks this."""
        ...

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        """Have a port forwarded to this machine: (external port, lifetime in seconds, 0 for one without an end).

        Raises Busy: that external port is another's; Refused; ConnectError: the router answers no more.
        """
        ...

    async def remove(self, protocol: MappingProtocol, port: int, external_port: int) -> None:
        """Give a mapping back. Raises as `add`."""
        ...
