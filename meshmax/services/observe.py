"""Tells peers how they are seen from here and which services there are for strangers; tries their ports; asks others the same.

Served to anyone. What another node says about our address is its word and no more: who uses it asks several. Rules: packets
go to nothing but the IP address that the asker's connection comes from, and to nobody behind a relay; each source (core.subnets)
has so many of them a second (TRIES_PER_S, TRIES_BURST), all together TRIES_TOTAL_PER_S, with PLACES knocks at once. A probe is
17 bytes, for a question of more than that which arrived on an authenticated connection. Not here: STUN and its TCP form
(services.stun_server), which need no connection of ours and no PeerId.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from meshmax.base.errors import Busy, ConnectError, InvalidRequest, MeshmaxError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.core.rates import Rates
from meshmax.core.subnets import source_of
from meshmax.net.addresses import multiaddr_of, parse_endpoint
from meshmax.ports import Datagrams, ProvesPeers, Signer, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.look_back import Knock, has_way, knock_nowhere
from meshmax.wire import observe as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.look_back import probe_of
from meshmax.wire.protocols import OBSERVE
from meshmax.wire.voucher import encode_voucher, sign_voucher

ANSWER_TIMEOUT_S: Final = 5.0  # for two small messages, or a knock at a port that drops
TRIES_PER_S: Final = 0.5  # probes and knocks for one source: a peer asks for some five every ten minutes
TRIES_BURST: Final = 24.0  # several peers behind one NAT, each with some ports
TRIES_TOTAL_PER_S: Final = 100.0  # a thousand peers that come back at once are through within a minute
PLACES: Final = 32  # knocks at once; each holds a socket for two seconds at most

# Sends a datagram from a UDP port that its receiver cannot know, but from the address of the main one; whether it went out.
SendOther: TypeAlias = Callable[[bytes, tuple[str, int]], bool]


def send_nowhere(_data: bytes, _to: tuple[str, int]) -> bool:
    """Where there are no ports."""
    return False


@dataclass(frozen=True)
class Reach:
    """How an observer gets at those who ask. ``clock``: monotonic seconds. Without ``datagrams`` there are no probes."""

    clock: Callable[[], float]
    knock: Knock = knock_nowhere
    datagrams: Datagrams | None = None
    send_other: SendOther = send_nowhere


@dataclass(frozen=True)
class Attest:
    """How an observer vouches for what it sees. ``unix_now``: Unix seconds."""

    signer: Signer
    unix_now: Callable[[], float]


class ObserveServer:
    """Ports as in wire.observe.Observed; ``services``: names of what is done for strangers here.

    Without ``attest`` there are no vouchers, without ``reach`` no ports are tried.
    """

    def __init__(
        self,
        udp_port: int,
        observer_port: int,
        services: tuple[str, ...],
        attest: Attest | None = None,
        reach: Reach | None = None,
    ) -> None:
        self._udp_port, self._observer_port, self._services = udp_port, observer_port, services
        self._attest, self._reach = attest, reach
        self._rates = Rates(TRIES_PER_S, TRIES_BURST, TRIES_TOTAL_PER_S)
        self._knocking = 0
        self._proves: ProvesPeers | None = None

    def register(self, swarm: Swarm) -> None:
        """Serve from now on."""
        self._proves = swarm if isinstance(swarm, ProvesPeers) else None
        swarm.serve(OBSERVE, self.answer, to="anyone")

    async def answer(self, stream: Stream) -> None:
        """One question, one answer. Raises PeerGone, RemoteProtocolError."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            frames = FrameStream(stream)
            question = await frames.receive(wire.FROM_ASKER)
            await frames.send(wire.FROM_OBSERVER, await self._reply(stream, question))
            return
        raise PeerGone("the peer did not ask in time")

    async def _reply(self, stream: Stream, question: wire.FromAsker) -> wire.FromObserver:
        try:
            ip = ip_behind(stream.address)
            if isinstance(question, wire.Probe):
                return wire.Probed(self._probe(ip, question))
            if isinstance(question, wire.Knock):
                return await self._knock(stream.peer, ip, question.port)
            address = stream.address[: wire.MAX_ADDRESS]
            voucher = self._voucher(stream.peer, ip)
            return wire.Observed(address, self._udp_port, self._observer_port, self._services, voucher)
        except MeshmaxError as error:
            return failure_of(error)

    def _voucher(self, peer_id: PeerId, ip: str) -> bytes:
        if self._attest is None or not ip:
            return b""
        signer = self._attest.signer
        return encode_voucher(sign_voucher(peer_id, ip, self._attest.unix_now(), signer.peer_id, signer.sign))

    def _probe(self, ip: str, question: wire.Probe) -> bool:
        """Whether a datagram was sent. Raises Busy."""
        datagrams = self._reach.datagrams if self._reach else None
        if self._reach is None or datagrams is None or not ip or not has_way(datagrams, ip):
            return False
        self._take(ip, self._reach)
        to, data = (ip, question.port), probe_of(question.nonce)
        if question.source == "other":
            return self._reach.send_other(data, to)
        datagrams.send(data, to)
        return True

    async def _knock(self, peer_id: PeerId, ip: str, port: int) -> wire.Knocked:
        """Who takes the connection must be who asks: behind one NAT another's port may be forwarded. Raises Busy."""
        if self._reach is None or not ip:
            return wire.Knocked("not_tried")
        self._take(ip, self._reach)
        if self._knocking >= PLACES:
            raise Busy("many ask at this moment", 1.0)
        self._knocking += 1
        try:
            outcome = await self._reach.knock(ip, port)
            if outcome == "open" and self._proves is not None:
                await self._proves.prove(peer_id, multiaddr_of(ip, port))
            return wire.Knocked(outcome)
        except ConnectError:
            return wire.Knocked("refused")
        finally:
            self._knocking -= 1

    def _take(self, ip: str, reach: Reach) -> None:
        if not self._rates.take(source_of(ip), reach.clock()):
            raise Busy("you asked often just now", 1 / TRIES_PER_S)


def ip_behind(address: str) -> str:
    """The IP address that a connection comes from, by its multiaddr; '' where there is none, as behind a relay."""
    try:
        endpoint = parse_endpoint(address)
    except InvalidRequest:
        return ""
    return "" if endpoint.name else endpoint.host


async def ask_observer(swarm: Swarm, peer_id: PeerId, question: wire.FromAsker) -> tuple[wire.FromObserver, str]:
    """What a connected node answers, and the multiaddr at which it is connected; never a Failure.

    Raises the error that it answers with (Busy), PeerGone, VersionMismatch (it serves no such questions), RemoteProtocolError.
    """
    stream = await swarm.open_stream(peer_id, OBSERVE)
    try:
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            frames = FrameStream(stream)
            await frames.send(wire.FROM_ASKER, question)
            reply = await frames.receive(wire.FROM_OBSERVER)
            if isinstance(reply, Failure):
                raise error_of(reply)
            return reply, stream.address
        raise PeerGone("the node did not answer in time")
    finally:
        with trio.CancelScope(shield=True):  # does not block
            await stream.reset()


async def ask_observed(swarm: Swarm, peer_id: PeerId) -> wire.Observed:
    """What a connected node says. Raises PeerGone, VersionMismatch (it does not answer such questions), RemoteProtocolError."""
    reply, _ = await ask_observer(swarm, peer_id, wire.Observe())
    if not isinstance(reply, wire.Observed):
        raise RemoteProtocolError("the node answered another question than ours")
    return reply
