"""What this peer says of itself now: its signed status, and what changed since it was signed.

The status is signed anew when lasting facts changed (base.status.lasting), and that is what spreads over the mesh; load, memory
and GPU figures go to neighbours as vitals, unsigned, when they change (at most once in STATUS_PAUSE_S) and every
STATUS_REFRESH_S.
Not here: what a status says (the ``describe`` that is passed in), whom it is told (core.gossip).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NoReturn

import msgspec
import trio

from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus, lasting
from meshmax.core.clones import Clones
from meshmax.core.gossip import Gossip
from meshmax.core.sequence import StatusSequence
from meshmax.ports import Signer, Swarm
from meshmax.telemetry.isolate import isolate
from meshmax.wire.signed import STATUS_DOMAIN, sign
from meshmax.wire.status import fitted

STATUS_PAUSE_S: Final = 0.25  # load changes with every prompt; neighbours need it soon, not each time
STATUS_REFRESH_S: Final = 15.0
SOON_S: Final = 0.01  # what made the change goes first: a prompt is on its way to its engine by then

Keep = Callable[[int], Awaitable[None]]  # writes a bound of the sequence down


class OwnStatus:
    """See the module. ``status`` is as of now; ``signed`` is what was signed last."""

    def __init__(
        self,
        swarm: Swarm,
        signer: Signer,
        describe: Callable[[], PeerStatus],
        unix_now: Callable[[], float],
        instance: str,
        sequence: StatusSequence,
        keep: Keep | None,
        gossip: Gossip,
        clones: Clones,
    ) -> None:
        self._swarm, self._signer, self._describe, self._unix_now = swarm, signer, describe, unix_now
        self._instance = instance
        self._sequence, self._keep = sequence, keep
        self._gossip, self._clones = gossip, clones
        self._changed = trio.Event()
        self._forced = False
        self.reissued = trio.Event()  # it is another one now: tell everybody; a new one each time
        self.status: PeerStatus
        self.signed: Signed
        self._lasting: tuple[object, ...] = ()
        self._issue(force=True)

    def changed(self, force: bool = False) -> None:
        """What the status tells has changed; ``force``: sign it anew in any case."""
        self._forced = self._forced or force
        self._changed.set()

    def issue(self) -> None:
        """Sign it anew at once, with no pause: what it said before is wrong now."""
        self._issue(force=True)

    async def reserve(self) -> None:
        """Keep how far our sequence may come, if it is time; a disk that takes it not is logged and costs no status."""
        bound = self._sequence.to_keep(int(self._unix_now() * 1000))
        if self._keep is not None and bound is not None and await isolate("sequence", partial(self._keep, bound)):
            self._sequence.kept(bound)

    async def run(self) -> NoReturn:
        """Issue it anew when it changed, and now and then."""
        while True:
            with trio.move_on_after(STATUS_REFRESH_S):
                await self._changed.wait()
                await trio.sleep(SOON_S)
            await self.reserve()
            self._changed = trio.Event()
            self._issue(self._forced)
            self._forced = False
            await trio.sleep(STATUS_PAUSE_S)

    def farewell(self) -> Signed:
        """Issue our last word; small, whatever we had."""
        self._issue(force=True, leaving=True)
        return self.signed

    def _issue(self, force: bool, leaving: bool = False) -> None:
        described = self._describe()
        status = msgspec.structs.replace(
            described,
            sequence=self._sequence.next(int(self._unix_now() * 1000)),
            issued_at_s=int(self._unix_now()),
            addresses=described.addresses or self._swarm.addresses,
            instance=self._instance,
            leaving=leaving,
        )
        facts = lasting(status)
        if force or facts != self._lasting:
            self._lasting = facts
            status = msgspec.structs.replace(status, changed=status.sequence, models=() if leaving else status.models)
            status = fitted(status)
            told = msgspec.structs.replace(status, demand=())  # is for neighbours, who hear it beside
            self.status, self.signed = status, sign(STATUS_DOMAIN, told, self._signer.peer_id, self._signer.sign)
            self._gossip.on_own(status, self.signed)
            self._clones.on_issued(status)
        else:
            self.status = fitted(msgspec.structs.replace(status, changed=self.status.changed))
        reissued, self.reissued = self.reissued, trio.Event()
        reissued.set()
