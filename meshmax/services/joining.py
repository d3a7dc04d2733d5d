"""Joining a mesh with a ticket: its issuer is dialled as a guest, until it answers or the ticket can never be worth anything.

Rules: the ticket is kept on disk until then, so that a restart goes on. The issuer is tried at the addresses of the ticket
and at those that anybody named meanwhile, the bootstrap nodes of the ticket among them; failures back off to MAX_PAUSE_S. What
is refused by the issuer itself is final. What goes on is said in ``problem``. Not here: what becomes of the certificate
(services.membership), what a ticket is worth (core.tickets).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError, NotAMember, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.membership import Ticket
from meshmax.base.units import format_span
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.chains import CLOCK_TOLERANCE_S
from meshmax.core.membership import Membership
from meshmax.ports import Discovery, Sighting, Swarm
from meshmax.services.tickets import ask_issuer
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire import membership as wire

ATTEMPT_TIMEOUT_S: Final = 15.0  # dialling, asking and the answer
FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 60.0
SIGHTINGS_WAITING: Final = 16
MAX_DIAL: Final = 8  # addresses that others named; the ticket has as many

_log = get_logger("joining")
AddressesOf = Callable[[PeerId], Sequence[str]]
Connect = Callable[[PeerId, Sequence[str]], Awaitable[None]]  # as a guest; raises ConnectError


class Joining:
    """One ticket on its way. ``settled`` is set with the first outcome, good or bad; ``refused`` if it was the last."""

    def __init__(self, ticket: Ticket, name: str) -> None:
        """``name``: what people call this node; the issuer's log shows it."""
        self.ticket = ticket
        self.problem = "not joined yet: the ticket's issuer is being asked"
        self.settled = trio.Event()
        self.refused: NotAMember | None = None
        self._name = name
        self._found: tuple[str, ...] = ()

    async def run(
        self,
        swarm: Swarm,
        addresses_of: AddressesOf,
        unix_now: Callable[[], float],
        random: Random,
        again: Callable[[], trio.Event],
        connect: Connect | None = None,
    ) -> wire.Issued | None:
        """The certificate, or None if there will never be one (see ``refused``). ``again``: an event that ends the pause.

        ``connect``: how the issuer is reached, if not by dialling alone.
        """
        reach = connect or partial(swarm.dial, guest=True)
        failures = 0
        while True:
            try:
                issued = await self._attempt(swarm, addresses_of, unix_now, reach)
            except NotAMember as error:
                self.refused = error
                self.problem = (
                    f"the ticket for '{self.ticket.mesh_name}' was refused: {error.message}"
                    " (`meshmax ticket` at a member makes another, `meshmax join` takes it)"
                )
                _log.warning("the ticket was refused", issuer=self.ticket.issuer, why=error.message)
                return None
            except MeshmaxError as error:
                failures += 1
                why = error.message
            else:
                return issued
            log = _log.info if failures == 1 else _log.debug
            pause_s = backoff_s(failures, FIRST_PAUSE_S, MAX_PAUSE_S, random)
            times = "once" if failures == 1 else f"{failures} times"
            self.problem = (
                f"not joined yet: the ticket's issuer was not reached (tried {times}): {why[:400]};"
                " it is tried on by the running peer, and `meshmax mesh leave` gives it up"
            )
            log("the ticket's issuer was not reached", issuer=self.ticket.issuer, why=why, again_in_s=round(pause_s, 1))
            self.settled.set()
            with trio.move_on_after(pause_s):
                await again().wait()

    async def search(self, rung: Discovery, news: Callable[[], None]) -> None:
        """Note where ``rung`` says that the issuer is, and tell of it; until cancelled."""
        send, receive = trio.open_memory_channel[Sighting](SIGHTINGS_WAITING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(isolate, "joining", partial(rung.run, send))
            async for sighting in receive:
                fresh = sighting.addresses[:MAX_DIAL]
                if sighting.peer_id == self.ticket.issuer and fresh != self._found:
                    self._found = fresh
                    news()

    async def _attempt(
        self, swarm: Swarm, addresses_of: AddressesOf, unix_now: Callable[[], float], reach: Connect
    ) -> wire.Issued:
        ticket, late_s = self.ticket, unix_now() - self.ticket.expires_at_s
        if late_s > CLOCK_TOLERANCE_S:
            raise NotAMember(f"the ticket expired {format_span(late_s)} ago: ask for a new one")
        named = [*ticket.addresses, *self._found, *addresses_of(ticket.issuer)]
        with trio.move_on_after(ATTEMPT_TIMEOUT_S):
            await reach(ticket.issuer, list(dict.fromkeys(named)))
            issued = await ask_issuer(swarm, ticket.issuer, wire.Redeem(ticket.secret, self._name))
            Membership(ticket.mesh).verify(issued.chain, swarm.peer_id, unix_now())
            return issued
        raise PeerGone(f"no answer within {ATTEMPT_TIMEOUT_S:g} s")
