"""TICKET, open to guests: a ticket is redeemed for a certificate, or a certificate for one that is valid for longer.

Rules: a peer may ask TRIES times at once and then once in TRY_PACE_S, all together TRIES_PER_S times a second, so that nobody
guesses a secret of 128 bits, nor keeps us signing. A use is written down before anything is issued for it. Who is refused
learns nothing of the mesh. Not here: which ticket is worth what (core.tickets), where an issuer is found (services.joining).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from meshmax.base.errors import Busy, MeshmaxError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import Chain
from meshmax.core.rates import Rates
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.standing import Standing
from meshmax.telemetry.log import get_logger
from meshmax.wire import membership as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.protocols import TICKET

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
        self._rates = Rates(1 / TRY_PACE_S, TRIES, TRIES_PER_S)

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
            reply = failure_of(error)
        with trio.move_on_after(ASK_TIMEOUT_S):
            await frames.send(wire.FROM_ISSUER, reply)

    async def _issue(self, peer_id: PeerId, message: wire.ToIssuer) -> wire.Issued:
        if not self._rates.take(peer_id, trio.current_time()):
            raise Busy("too many tickets are tried here: try again in a moment", TRY_PACE_S)
        standing, now_s = self._standing(), self._unix_now()
        if isinstance(message, wire.Redeem):
            chain = await self._redeem(standing, peer_id, message, now_s)
        else:
            own = standing.verify(message.chain, peer_id, now_s).certificate
            chain = standing.issue(peer_id, own.scopes, now_s, own.serial)
        verb = "was admitted with a ticket" if isinstance(message, wire.Redeem) else "renewed its certificate"
        _log.info(f"a peer {verb}", peer=peer_id)
        return wire.Issued(chain, standing.name)

    async def _redeem(self, standing: Standing, peer_id: PeerId, message: wire.Redeem, now_s: float) -> Chain:
        revoked_at_s = standing.core.revocations.revoked_at_s(peer_id) if standing.core else None
        scopes = standing.tickets.redeem(message.secret, peer_id, now_s, revoked_at_s)
        await self._keep(standing)
        return standing.issue(peer_id, scopes, now_s)


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
