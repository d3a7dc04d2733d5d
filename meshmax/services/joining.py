"""Joining a mesh with a ticket: its issuer is dialled as a guest, until it answers or the ticket can never be worth anything.

Rules: the ticket is kept on disk until then, so that a restart goes on. The issuer is tried at the addresses of the ticket
and at those that anybody named meanwhile, the bootstrap nodes of the ticket among them; also over these as relays, whether or
not the ticket knows of a place there: the issuer may have found one since. Failures back off to EARLY_PAUSE_S, and to
MAX_PAUSE_S when EARLY_S have passed since the beginning, since our network changed or since the bootstrap nodes came back. Who
waits for the first outcome waits SEARCH_S for those, too, where the ticket names any. What is refused by the issuer itself is
final. What goes on, and when the next try is, is said in ``problem``. Not here: what becomes of the certificate
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
from meshmax.core.dial_plan import CIRCUIT, MAX_RELAYS
from meshmax.core.membership import Membership
from meshmax.core.rendezvous import learnt_bootstrap
from meshmax.ports import Discovery, Sighting, Swarm
from meshmax.services.tickets import ask_issuer
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire import membership as wire

ATTEMPT_TIMEOUT_S: Final = 15.0  # dialling, asking and the answer
PATIENCE_S: Final = 3.0  # of these, for the dialling, once there is new hope elsewhere; a relay far away needs two
FIRST_PAUSE_S: Final = 1.0
EARLY_PAUSE_S: Final = 15.0  # a person looks on
EARLY_S: Final = 300.0
MAX_PAUSE_S: Final = 60.0
SEARCH_S: Final = 8.0  # a bootstrap node is dialled and asked, and the issuer dialled over it
LOOK_S: Final = 2.0  # between looks whether the bootstrap nodes are back
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
        self._said = "not joined yet: the ticket's issuer is being asked"
        self._failed: tuple[str, float] | None = None  # what came of the last try, and when the next one is
        self._failures = 0  # in a row, since trying was last given a fresh start
        self._began: float | None = None  # when that was
        self._again = False  # there is new hope since the last try began
        self._reaching = trio.CancelScope()  # of its dialling
        self._named: tuple[str, ...] = ()  # where it dials
        self.settled = trio.Event()
        self.refused: NotAMember | None = None
        self._name = name
        self._found: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """How it stands, for people. Asked for inside trio."""
        if self._failed is None:
            return self._said
        why, at = self._failed
        left_s = round(at - trio.current_time())
        when = f"next try in {left_s} s" if left_s > 0 else "being tried now"
        return f"{why}; it is tried on by the running peer ({when}), and `meshmax mesh leave` gives it up"

    def look_again(self) -> None:
        """What failed may work now: try again soon and often, as at the beginning. The caller ends the pause. Cheap."""
        self._failures, self._began = 0, trio.current_time()
        self._hasten()

    def _hasten(self) -> None:
        """A try that is under way began without this hope: it has not all its time any more, and the next follows at once."""
        self._again = True
        self._reaching.deadline = min(self._reaching.deadline, trio.current_time() + PATIENCE_S)

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
        tries, began = 0, trio.current_time()
        self._failures, self._began = 0, began
        while True:
            self._again = False
            try:
                issued = await self._attempt(swarm, addresses_of, unix_now, reach)
            except NotAMember as error:
                self.refused = error
                self._failed = None
                self._said = (
                    f"the ticket for '{self.ticket.mesh_name}' was refused: {error.message}"
                    " (`meshmax ticket` at a member makes another, `meshmax join` takes it)"
                )
                _log.warning("the ticket was refused", issuer=self.ticket.issuer, why=error.message)
                return None
            except MeshmaxError as error:
                tries, self._failures = tries + 1, self._failures + 1
                why = error.message
            else:
                return issued
            log = _log.info if tries == 1 else _log.debug
            pause_s = 0.0 if self._again else self._pause_s(random)
            times = "once" if tries == 1 else f"{tries} times"
            said = f"not joined yet: the ticket's issuer was not reached (tried {times}): {why[:400]}"
            self._failed = said, trio.current_time() + pause_s
            log("the ticket's issuer was not reached", issuer=self.ticket.issuer, why=why, again_in_s=round(pause_s, 1))
            if not self.ticket.bootstrap or trio.current_time() - began >= SEARCH_S:
                self.settled.set()
            with trio.move_on_after(pause_s):
                await again().wait()

    def _pause_s(self, random: Random) -> float:
        early = self._began is not None and trio.current_time() - self._began < EARLY_S
        return backoff_s(max(self._failures, 1), FIRST_PAUSE_S, EARLY_PAUSE_S if early else MAX_PAUSE_S, random)

    async def search(self, rung: Discovery, news: Callable[[], None]) -> None:
        """Note where ``rung`` says that the issuer is, and tell of it; until cancelled."""
        send, receive = trio.open_memory_channel[Sighting](SIGHTINGS_WAITING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(isolate, "joining", partial(rung.run, send))
            nursery.start_soon(self._watch, rung, news)
            async for sighting in receive:
                fresh = sighting.addresses[:MAX_DIAL]
                if sighting.peer_id == self.ticket.issuer and fresh != self._found:
                    self._found = fresh
                    if not set(fresh) <= set(self._named):
                        self._hasten()
                    news()

    async def _watch(self, rung: Discovery, news: Callable[[], None]) -> None:
        """Try again as soon as nodes that did not serve us do."""
        before = ""
        while True:
            await trio.sleep(LOOK_S)
            problem = getattr(rung, "problem", "")  # rungs may have one
            if before and not problem:
                self.look_again()
                news()
            before = problem

    async def _attempt(
        self, swarm: Swarm, addresses_of: AddressesOf, unix_now: Callable[[], float], reach: Connect
    ) -> wire.Issued:
        ticket, late_s = self.ticket, unix_now() - self.ticket.expires_at_s
        if late_s > CLOCK_TOLERANCE_S:
            raise NotAMember(f"the ticket expired {format_span(late_s)} ago: ask for a new one")
        over = [f"{text}{CIRCUIT}" for text in learnt_bootstrap(ticket.bootstrap)[:MAX_RELAYS]]
        named = [*ticket.addresses, *self._found, *over, *addresses_of(ticket.issuer)]
        self._named = tuple(dict.fromkeys(named))
        with trio.move_on_after(ATTEMPT_TIMEOUT_S):
            with trio.CancelScope() as self._reaching:
                await reach(ticket.issuer, self._named)
            if self._reaching.cancelled_caught:
                raise PeerGone("no answer in time")
            issued = await ask_issuer(swarm, ticket.issuer, wire.Redeem(ticket.secret, self._name))
            Membership(ticket.mesh).verify(issued.chain, swarm.peer_id, unix_now())
            return issued
        raise PeerGone(f"no answer within {ATTEMPT_TIMEOUT_S:g} s")
