"""The network: streams, connections, and how peers are found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, runtime_checkable

import msgspec
import trio

from meshmax.base.ids import PeerId
from meshmax.base.status import Path


class Stream(Protocol):
    """A byte stream to a peer whose PeerId the connection has proved. One reader and one writer at a time."""

    @property
    def peer(self) -> PeerId:
        """Whose stream this is."""
        ...

    @property
    def address(self) -> str:
        """Where the connection comes from: a multiaddr without /p2p; not proved, a NAT may stand there."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """1 to ``max_bytes`` bytes, or b"" at the end. Raises PeerGone when the stream was reset or the peer is lost."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send everything. Cancelling it may cost this stream (reset it then), never the connection. Raises PeerGone."""
        ...

    async def send_eof(self) -> None:
        """We send no more; the other direction stays open."""
        ...

    async def reset(self) -> None:
        """Give the stream up in both directions at once; idempotent, never raises."""
        ...

    async def aclose(self) -> None:
        """Close both directions in order; idempotent, never raises; does not block for long on a stalled peer."""
        ...


class ByteStream(Protocol):
    """A connected pair's one end, before anybody proved who they are. ``remote`` is (IP address, port)."""

    remote: tuple[str, int]

    async def send_all(self, data: bytes) -> None:
        """Send everything. Raises OSError or trio's Broken- and ClosedResourceError."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """1 to ``max_bytes`` bytes or b"" at the end. Raises OSError or trio's Broken- and ClosedResourceError."""
        ...

    def close(self) -> None:
        """Close both directions now and wake whoever sends or receives; idempotent."""
        ...


class ConnectionView(msgspec.Struct, frozen=True):
    """A connection as it is: the remote's address (multiaddr without /p2p), who dialled, since when (Unix time).

    ``path``: how it gets there. Over a relay the address is the relay's, followed by /p2p/<relay>/p2p-circuit.
    """

    peer_id: PeerId
    address: str
    direction: Literal["in", "out"]
    opened_at_s: float
    path: Path = "direct"


class SwarmEvent(msgspec.Struct, frozen=True):
    """A peer got its first connection to us, lost its last one, or ("moved") its best one is another than before."""

    peer_id: PeerId
    kind: Literal["connected", "disconnected", "moved"]


class Connections(Protocol):
    """Who is connected, and over what."""

    async def disconnect(self, peer_id: PeerId, last: ConnectionView | None = None) -> None:
        """Close every connection to the peer; stalled writers included. No error if there is none.

        With ``last`` (of `connections`) only that one and older ones over the same kind of path: what the peer has opened
        since may be good, and so may another path.
        """
        ...

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        """The best connection of each peer that is connected now."""
        ...

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[SwarmEvent]]:
        """Events from now on, peers that are connected already first, as "connected"; a slow reader misses none."""
        ...


class Swarm(Connections, Protocol):
    """Authenticated connections to peers and streams over them. The only place that knows libp2p is its adapter."""

    @property
    def peer_id(self) -> PeerId:
        """Who this is."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Dialable multiaddrs of ours, each ending in /p2p/<PeerId>."""
        ...

    async def dial(
        self,
        peer_id: PeerId,
        addresses: Sequence[str],
        *,
        guest: bool = False,
        delays_s: Sequence[float] = (),
        better: bool = False,
    ) -> None:
        """Connect, racing ``addresses`` (at most 16; the first to authenticate wins); returns at once if connected.

        ``delays_s``: by address, how long after the beginning it is tried, or when those before have failed; all at once
        otherwise. ``better``: being connected
        over a relay, or by punching, is not enough.

        Members of one mesh recognise each other before anything else (`Admission`); who is not admitted is refused.
        ``guest``: do without: only protocols served to "anyone" work, as those of a bootstrap node, and the peer is neither in
        `connections` nor in events. Raises ConnectError with every attempt, NotAMember. A peer that failed before is tried
        again. Deadlines are the caller's.
        """
        ...

    async def adopt(
        self,
        stream: ByteStream,
        peer_id: PeerId,
        direction: Literal["in", "out"],
        path: Path,
        address: str,
        *,
        guest: bool = False,
    ) -> None:
        """Make a connection of a byte stream that was made otherwise (punched, relayed); returns when it is admitted.

        Both ends adopt, one of them as "out". Over it the PeerId is proved and membership settled as over any. A peer may
        then have several connections: new streams go over the one with the best path, and the others end when their last
        stream has. ``guest``: as in `dial`; of an "in" end, who comes may also be a guest. Takes ownership of ``stream``,
        which is closed on every failure. Raises ConnectError, NotAMember. Deadlines are the caller's.
        """
        ...

    async def open_stream(self, peer_id: PeerId, protocol: str, *, eager: bool = False) -> Stream:
        """A new stream on the best connection. Raises PeerGone, VersionMismatch if the peer does not serve ``protocol``.

        ``eager``, for who has the first message: that need not wait for the peer's consent, a round trip; the first
        `receive_some` may raise VersionMismatch or RemoteProtocolError instead, and resets the stream if cancelled.
        """
        ...

    def serve(
        self,
        protocol: str,
        answer: Callable[[Stream], Awaitable[None]],
        *,
        to: Literal["members", "anyone"] = "members",
    ) -> None:
        """Run ``answer`` in a task of its own for each stream that peers open; its errors are logged, the stream then reset.

        Streams at once are bounded per peer and in all; those beyond are reset. A stream of a peer that is not admitted (yet)
        waits for its admission for a moment unless the protocol is served to "anyone".
        """
        ...


class Admission(Protocol):
    """Whom a swarm takes for a member; asked by its adapter about each new connection."""

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        """Settle it over ``stream``, which the dialling side ("out") opened for the protocol MEMBER.

        Raises NotAMember (with the reason, for both ends), MeshmaxError; the connection is then closed. Deadlines are the
        caller's.
        """
        ...

    def check(self, peer_id: PeerId, protocol: str) -> None:
        """May this admitted peer use ``protocol``? Raises OutOfScope, NotAMember. Cheap; asked for each stream."""
        ...


class Datagrams(Protocol):
    """The UDP port of this node: several protocols share it, told apart by their first byte (RFC 7983)."""

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Bound (ip, port)s."""
        ...

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        """Send one datagram, now or never: what the kernel cannot take is dropped, as the network would. Any family bound."""
        ...

    def receive(self, first_bytes: range, on_datagram: Callable[[bytes, tuple[str, int]], None]) -> None:
        """Call ``on_datagram(data, sender)`` in trio's thread for each datagram that begins so; it must not block."""
        ...


class Sighting(msgspec.Struct, frozen=True):
    """Somebody said that a peer can be reached at these multiaddrs (each may end in /p2p/<PeerId>). Not yet believed."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    source: Literal["mdns", "static", "cached", "gossip", "rendezvous", "dht"]


class Discovery(Protocol):
    """One rung of the discovery ladder."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""
        ...

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """Look for peers, and let ourselves be found, until cancelled. Repeats itself; recovers from network errors."""
        ...


@runtime_checkable
class LooksAgain(Protocol):
    """What a rung may offer besides `Discovery`: to be told that now is a good moment."""

    def look_again(self) -> None:
        """The network changed, or a person asks: look at once, pauses afresh. Cheap, never raises, called from any task."""
        ...


@runtime_checkable
class CountsStreams(Protocol):
    """What a swarm may offer besides `Swarm`: whether a peer is in use."""

    def streams(self, peer_id: PeerId) -> int:
        """Streams open with the peer now, opened by either side. Cheap."""
        ...


@runtime_checkable
class HearsPeers(Protocol):
    """What a swarm may offer besides `Swarm`: whether anything comes from a peer."""

    def heard_s(self, peer_id: PeerId, over: ConnectionView | None = None) -> float | None:
        """Monotonic seconds: when bytes came from the peer last, of any stream. Cheap.

        ``over``: on that connection; None: on any of its connections. None where there is none.
        """
        ...


@runtime_checkable
class PromisesProtocols(Protocol):
    """What a swarm may offer besides `Swarm`: that who comes before all protocols are served waits for them."""

    def promise(self, protocols: Iterable[str]) -> None:
        """``protocols`` will be served: a peer's stream of one waits until it is, for a bounded time."""
        ...

    def promised_all(self) -> tuple[str, ...]:
        """Nothing more will be served: promises that were not kept are void, and returned."""
        ...


@runtime_checkable
class ProvesPeers(Protocol):
    """What a swarm may offer besides `Swarm`: to see who is at an address."""

    async def prove(self, peer_id: PeerId, address: str) -> None:
        """Connect to ``address`` (a multiaddr) anew and hang up once ``peer_id`` has proved to be there.

        Raises ConnectError: nobody is, or somebody else. Deadlines are the caller's.
        """
        ...


class Network(Protocol):
    """The networks that this machine is on."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """IP addresses of ours on interfaces that are up and running, without loopback."""
        ...

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` soon after they changed, or after this machine slept. It must not block, and is kept for ever."""
        ...
