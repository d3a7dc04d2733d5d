"""Tickets that this node gave out: which secret is worth what, how often, and until when.

Rules: only a hash of the secret is kept, and compared in constant time with all of them. A use is one peer: who asks again (its
answer was lost) is answered again and not counted. A peer that was revoked after the ticket was made needs a new one. Tickets
that are used up or expired are remembered for a while, to say why, and make room for new ones. Not here: the ticket's text
(wire.ticket), the certificate and whether whoever gives the ticket may (core.membership).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from meshmax.base.errors import InvalidRequest, NotAMember, QuotaExceeded
from meshmax.base.ids import PeerId
from meshmax.base.membership import Scope
from meshmax.base.units import format_span
from meshmax.wire.membership import SECRET_BYTES, ordered

MAX_TICKETS: Final = 256  # kept; each has a hash and the ids of who used it
MAX_USES: Final = 100  # of one ticket
MAX_LIFE_S: Final = 366 * 86400
MEMORY_S: Final = 30 * 86400  # how long it is remembered why an expired ticket is refused

_HASH_CONTEXT: Final = b"meshmax/ticket-secret/1\n"


class GivenTicket(msgspec.Struct, frozen=True):
    """A ticket as its giver keeps it: ``secret_hash`` of 32 bytes, ``uses`` in all, who had one. Unix seconds."""

    secret_hash: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    scopes: tuple[Scope, ...]
    given_at_s: int
    expires_at_s: int
    uses: Annotated[int, msgspec.Meta(ge=1, le=MAX_USES)]
    used_by: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=MAX_USES)] = ()

    def is_open(self, now_s: float) -> bool:
        """Whether somebody new may use it."""
        return now_s < self.expires_at_s and len(self.used_by) < self.uses


class Tickets:
    """The tickets of one mesh that this node gave out. ``given``: what was kept."""

    def __init__(self, given: Iterable[GivenTicket] = ()) -> None:
        self._given = list(given)[-MAX_TICKETS:]

    @property
    def given(self) -> tuple[GivenTicket, ...]:
        """All, oldest first, to be kept."""
        return tuple(self._given)

    def give(self, secret: bytes, scopes: Sequence[Scope], life_s: float, uses: int, now_s: float) -> GivenTicket:
        """Note a new ticket. Raises InvalidRequest, QuotaExceeded (too many are open)."""
        if not 1 <= uses <= MAX_USES:
            raise InvalidRequest(f"a ticket has 1 to {MAX_USES} uses")
        if not 1 <= life_s <= MAX_LIFE_S:
            raise InvalidRequest("a ticket is valid for a second at least and a year at most")
        if len(secret) != SECRET_BYTES or not scopes:
            raise InvalidRequest("a ticket needs a secret and a scope")
        self._make_room(now_s)
        ticket = GivenTicket(_hash(secret), ordered(scopes), int(now_s), int(now_s + life_s), uses)
        self._given.append(ticket)
        return ticket

    def redeem(
        self, secret: bytes, peer_id: PeerId, now_s: float, revoked_at_s: int | None = None
    ) -> tuple[Scope, ...]:
        """The scopes that ``peer_id`` gets for ``secret``; the use is counted, to be kept before anything is issued.

        ``revoked_at_s``: of the peer's revocation, if it was revoked. Raises NotAMember with a sentence for the asker.
        """
        index = self._find(secret)
        if index is None:
            raise NotAMember(
                "the ticket is not known here: it was withdrawn, or made for another mesh; ask for a new one"
            )
        ticket = self._given[index]
        if now_s >= ticket.expires_at_s:
            raise NotAMember(f"the ticket expired {format_span(now_s - ticket.expires_at_s)} ago: ask for a new one")
        if revoked_at_s is not None and ticket.given_at_s <= revoked_at_s:
            raise NotAMember("this peer was revoked, and the ticket is older than that: ask for a new one")
        if peer_id in ticket.used_by:
            return ticket.scopes
        if len(ticket.used_by) >= ticket.uses:
            raise NotAMember("the ticket is used up: ask for a new one")
        self._given[index] = msgspec.structs.replace(ticket, used_by=(*ticket.used_by, peer_id))
        return ticket.scopes

    def withdraw_all(self, now_s: float) -> int:
        """Nobody may use a ticket given so far any more; how many somebody still could have."""
        count, self._given = self.open_count(now_s), []
        return count

    def open_count(self, now_s: float) -> int:
        """How many somebody new may use."""
        return sum(ticket.is_open(now_s) for ticket in self._given)

    def _find(self, secret: bytes) -> int | None:
        wanted, found = _hash(secret), None
        for index, ticket in enumerate(self._given):  # to the end, so that the time says nothing of where it stands
            if hmac.compare_digest(ticket.secret_hash, wanted):
                found = index
        return found

    def _make_room(self, now_s: float) -> None:
        self._given = [ticket for ticket in self._given if now_s < ticket.expires_at_s + MEMORY_S]
        if len(self._given) < MAX_TICKETS:
            return
        closed = next((ticket for ticket in self._given if not ticket.is_open(now_s)), None)
        if closed is None:
            raise QuotaExceeded(f"{MAX_TICKETS} tickets are open: wait until some are used or expired")
        self._given.remove(closed)


def _hash(secret: bytes) -> bytes:
    return blake3(_HASH_CONTEXT + secret).digest()
