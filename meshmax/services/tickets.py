"""Tickets: given, taken back, redeemed for a certificate.

TICKET, open to guests: a ticket is redeemed, or a certificate renewed.

Rules: a peer may ask TRIES times at once and then once in TRY_PACE_S, all together TRIES_PER_S times a second, so that nobody
guesses a secret of 128 bits, nor keeps us signing; members are counted apart, so that strangers keep nobody from renewing.
A use is written down before anything is issued for it. Who is refused learns nothing of the mesh. Not here: which ticket is
worth what (core.tickets), where an issuer is found (services.joining).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from meshmax.base.errors import (
    Busy,
    InvalidRequest,
    MeshmaxError,
    NotAMember,
    OutOfScope,
    RemoteProtocolError,
    StoreError,
)
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_TICKET_ADDRESSES, Chain, Scope, Ticket
from meshmax.core.rates import Rates
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.standing import Standing
from meshmax.telemetry.log import get_logger
from meshmax.wire import membership as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.protocols import TICKET
from meshmax.wire.ticket import ticket_text

ASK_TIMEOUT_S: Final = 5.0  # from the opening of a stream to the question on it; the same for the answer
TRIES: Final = 5
TRY_PACE_S: Final = 5.0
TRIES_PER_S: Final = 20.0

_log = get_logger("tickets")


class TicketDesk:
    """Answers for the standing that ``standing`` names now; ``keep`` writes its tickets down. Raises StoreError there."""

    def __init__(
        self,
        standing: Callable[[], Standing],
        keep: Callable[[Standing], Awaitable[None]],
        unix_now: Callable[[], float],
    ) -> None:
        self._standing, self._keep, self._unix_now = standing, keep, unix_now
        self._strangers, self._members = (Rates(1 / TRY_PACE_S, TRIES, TRIES_PER_S) for _ in range(2))

    async def give(
        self,
        scopes: Sequence[Scope],
        expires_s: float,
        uses: int,
        addresses: Sequence[str],
        bootstrap: Sequence[str],
    ) -> str:
        """The text of a new ticket. Raises InvalidRequest, OutOfScope, NotAMember, QuotaExceeded, StoreError."""
        standing, now_s = self._standing(), self._unix_now()
        own = _private(standing).own(now_s)
        if standing.root is None and own and not {"admin", *scopes} <= set(own.scopes):
            raise OutOfScope(
                "a ticket can give what its giver has, and needs the scope admin: " + ", ".join(own.scopes)
            )
        secret = secrets.token_bytes(wire.SECRET_BYTES)
        given = standing.tickets.give(secret, scopes, expires_s, uses, now_s)
        await self._keep(standing)
        ticket = Ticket(
            standing.mesh,
            standing.name,
            standing.signer.peer_id,
            secret,
            given.scopes,
            given.expires_at_s,
            tuple(addresses[:MAX_TICKET_ADDRESSES]),
            tuple(bootstrap[:MAX_TICKET_ADDRESSES]),
        )
        return ticket_text(ticket)

    async def withdraw_all(self) -> int:
        """Take back every ticket; how many could still be used. Raises InvalidRequest, StoreError."""
        standing = _private(self._standing())
        count = standing.tickets.withdraw_all(self._unix_now())
        await self._keep(standing)
        return count

    async def answer(self, stream: Stream) -> None:
        """One question and its answer. Raises RemoteProtocolError, PeerGone."""
        frames = FrameStream(stream)
        message = None
        with trio.move_on_after(ASK_TIMEOUT_S):
            message = await frames.receive(wire.TO_ISSUER)
        if message is None:
            raise RemoteProtocolError("the peer opened a stream and asked for nothing")
        try:
            reply: wire.FromIssuer = await self._issue(frames.peer, message)
        except MeshmaxError as error:
            _log.info("no certificate was issued", peer=frames.peer, why=error.message)
            # A store's error names a path of ours, which is nothing to tell a stranger.
            told = StoreError("the ticket's giver cannot write it down now") if isinstance(error, StoreError) else error
            reply = failure_of(told)
        with trio.move_on_after(ASK_TIMEOUT_S):
            await frames.send(wire.FROM_ISSUER, reply)

    async def _issue(self, peer_id: PeerId, message: wire.ToIssuer) -> wire.Issued:
        standing, now_s = self._standing(), self._unix_now()
        rates = self._members if standing.knows(peer_id) else self._strangers
        if not rates.take(peer_id, trio.current_time()):
            raise Busy("too many tickets are tried here: try again in a moment", TRY_PACE_S)
        if isinstance(message, wire.Redeem):
            chain = await self._redeem(standing, peer_id, message, now_s)
        else:
            own = standing.verify(message.chain, peer_id, now_s).certificate
            chain = standing.issue(peer_id, own.scopes, now_s, own.serial)
        if isinstance(message, wire.Redeem):
            called = "".join(c if c.isprintable() else " " for c in message.name)
            _log.info("a peer was admitted with a ticket", peer=peer_id, called=called)
        else:
            _log.info("a peer renewed its certificate", peer=peer_id)
        return wire.Issued(chain, standing.name)

    async def _redeem(self, standing: Standing, peer_id: PeerId, message: wire.Redeem, now_s: float) -> Chain:
        revoked_at_s = standing.core.revocations.revoked_at_s(peer_id) if standing.core else None
        scopes = standing.tickets.redeem(message.secret, peer_id, now_s, revoked_at_s)
        await self._keep(standing)
        try:
            return standing.issue(peer_id, scopes, now_s)
        except (NotAMember, OutOfScope) as error:
            _log.warning("a ticket of ours is worth nothing any more", peer=peer_id, why=error.message)
            raise NotAMember(
                "who gave the ticket may not admit others any more: ask another member for a new one"
            ) from None


def reachable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those for a ticket, which another machine can use; all, where there are no such."""
    others = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return tuple(others or addresses)[:MAX_TICKET_ADDRESSES]


def _private(standing: Standing) -> Standing:
    if standing.core is None:
        raise InvalidRequest("the open mesh needs no tickets: `meshmax mesh new NAME` makes a mesh that has them")
    return standing


async def ask_issuer(swarm: Swarm, peer_id: PeerId, question: wire.ToIssuer) -> wire.Issued:
    """What ``peer_id``, with whom there is a connection, issues. Raises NotAMember, OutOfScope, Busy, PeerGone and the like."""
    stream = await swarm.open_stream(peer_id, TICKET)
    try:
        frames = FrameStream(stream)
        await frames.send(wire.TO_ISSUER, question)
        answer = await frames.receive(wire.FROM_ISSUER)
    finally:
        with trio.CancelScope(shield=True):
            await stream.aclose()
    if isinstance(answer, Failure):
        raise error_of(answer)
    return answer
