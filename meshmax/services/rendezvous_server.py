"""Answers rendezvous requests of anybody: proves who registers, keeps to rates, leaves the decisions to core.registrations.

Rules. A peer registers and unregisters only itself: the record is signed by the peer that the connection has proved. The
unsigned form of earlier stacks is taken from the peer itself, too, and handed on as it came. A stream serves MAX_REQUESTS
requests; who asks more often than the rates allow, alone or with its whole subnet, is told to come later. Nobody needs to
be a member to be served. Not here: what is held how long (core.registrations), the messages (wire.rendezvous).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import trio

from meshmax.base.errors import Busy, ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.core.rates import Rates
from meshmax.core.registrations import EXPIRE_S, Registrations
from meshmax.core.subnets import ip_of, source_of
from meshmax.ports import Stream, Swarm
from meshmax.services.rendezvous_stream import RendezvousStream
from meshmax.wire import rendezvous
from meshmax.wire.peer_record import open_record
from meshmax.wire.protocols import RENDEZVOUS
from meshmax.wire.rendezvous import (
    Discover,
    DiscoverResponse,
    Message,
    Register,
    RegisterResponse,
    Unregister,
    try_read_peer_info,
)

MAX_REQUESTS: Final = 64  # on one stream; the whole of the largest namespace has 41 pages
REQUEST_TIMEOUT_S: Final = 15.0  # until the next request of a stream is there, and until an answer is taken
MAX_STREAMS: Final = 128  # at once, in all; an answer has up to 256 KiB
MAX_SUBNET_STREAMS: Final = 48  # the same of one subnet, so that no site takes all
MAX_PEER_STREAMS: Final = 4  # the same of one peer; ours has one

PEER_PER_S, PEER_BURST = 0.5, 64.0  # requests of one PeerId: a new member asks for pages, later twice in five minutes
SUBNET_PER_S, SUBNET_BURST = 20.0, 500.0  # of a site behind one NAT, whose peers may all start at once
TOTAL_PER_S: Final = 200.0  # at worst (a full table, all from different subnets) half of one core

_SLOW_DOWN: Final = "too many requests: come again later"


class RendezvousServer:
    """See the module. Made by `open_rendezvous_server`."""

    def __init__(self, registrations: Registrations) -> None:
        self.registrations = registrations
        self._peers = Rates(PEER_PER_S, PEER_BURST, TOTAL_PER_S)
        self._subnets = Rates(SUBNET_PER_S, SUBNET_BURST, TOTAL_PER_S)
        self._streams: Counter[str] = Counter()  # by PeerId, and by subnet

    async def answer(self, stream: Stream) -> None:
        """Serve one stream to its end. Raises Busy where too many are open, RemoteProtocolError, PeerGone."""
        peer, subnet = f"peer {stream.peer}", source_of(ip_of(stream.address))
        if (
            self._streams[peer] >= MAX_PEER_STREAMS
            or self._streams[subnet] >= MAX_SUBNET_STREAMS
            or self._streams.total() >= 2 * MAX_STREAMS  # each is counted twice
        ):
            raise Busy("too many rendezvous streams are open")
        self._streams.update((peer, subnet))
        try:
            await self._serve(stream)
        finally:
            self._streams.subtract((peer, subnet))
            self._streams = +self._streams  # strangers choose the keys, so those that are used up must not stay

    async def _serve(self, stream: Stream) -> None:
        messages = RendezvousStream(stream, rendezvous.MAX_REQUEST_BYTES)
        for _ in range(MAX_REQUESTS):
            with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
                request = await messages.try_receive()
                response = None if request is None else self.response(request, stream.peer, stream.address)
                if response is not None:
                    await messages.send(response)
            if scope.cancelled_caught or request is None:
                return

    def response(self, request: Message, peer: PeerId, address: str) -> Message | None:
        """What is answered to ``request`` of ``peer``, whose connection comes from ``address``; None: nothing."""
        now = trio.current_time()
        group = source_of(ip_of(address))
        welcome = self._subnets.take(group, now) and self._peers.take(peer, now)
        match request:
            case Register():
                if not welcome:
                    return RegisterResponse(rendezvous.E_UNAVAILABLE, _SLOW_DOWN)
                return self._register(request, peer, group, now)
            case Discover():
                if not welcome:
                    return DiscoverResponse(status=rendezvous.E_UNAVAILABLE, text=_SLOW_DOWN)
                return self.registrations.discover(request, now)
            case Unregister(namespace):
                self.registrations.unregister(namespace, peer)
                return None
            case _:
                raise RemoteProtocolError("the peer sent a rendezvous answer where a request was due")

    def _register(self, request: Register, peer: PeerId, group: str, now: float) -> RegisterResponse:
        if unsigned := try_read_peer_info(request.record):
            named, sequence, addresses = unsigned[0], 0, unsigned[1]
        else:
            try:
                record = open_record(request.record)
            except ManifestInvalid as error:
                return RegisterResponse(rendezvous.E_INVALID_SIGNED_PEER_RECORD, error.message)
            named, sequence, addresses = record.peer_id, record.sequence, record.addresses
        if named != peer:
            return RegisterResponse(rendezvous.E_NOT_AUTHORIZED, "a peer registers itself alone")
        return self.registrations.register(request, peer, sequence, addresses, group, now)

    async def run(self) -> NoReturn:
        """Forget what has expired, again and again."""
        while True:
            await trio.sleep(EXPIRE_S)
            self.registrations.expire(trio.current_time())


@asynccontextmanager
async def open_rendezvous_server(
    swarm: Swarm, registrations: Registrations | None = None
) -> AsyncIterator[RendezvousServer]:
    """A rendezvous server on ``swarm``, for anyone, until the block is left."""
    server = RendezvousServer(registrations or Registrations(secrets.token_bytes(32)))
    swarm.serve(RENDEZVOUS, server.answer, to="anyone")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
