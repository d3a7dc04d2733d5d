"""A visit of the doctor to a peer that runs: climb each rung, have peers look back, look at the machine; then what follows.

Steps, all within BUDGET_S: every rung looks anew, LOOK_S long or until all have found somebody, while the machine is looked at;
then up to MAX_ASKED peers, the nearest first, are asked at once to look back. Visits follow each other, so that nobody
makes us ask around without end. Not here: the findings (core.doctor), how they are shown (cli, api).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec
import trio

from meshmax.base.doctor import (
    BootstrapSeen,
    Diagnosis,
    Facts,
    LookedBack,
    MachineFacts,
    PeerFacts,
    PortKind,
    RefusedPeer,
    RungLook,
)
from meshmax.base.status import PeerView
from meshmax.core.doctor import diagnose
from meshmax.services.ladder import Ladder
from meshmax.services.look_back import LookBack

LOOK_S: Final = 3.0  # mDNS answers in a tenth of a second, a rendezvous in a round trip or two
LOOK_STEP_S: Final = 0.1
MAX_ASKED: Final = 8
BUDGET_S: Final = 10.0  # a person waits that long; LOOK_S and ASK_TIMEOUT_S stay within it
Step = Callable[[str], Awaitable[None]]  # told of each step as it begins, in words


class Patient(Protocol):
    """What the doctor asks the node itself, beside rungs and peers."""

    def online(self) -> tuple[PeerView, ...]:
        """Connected peers, the nearest first."""
        ...

    def ports(self) -> tuple[tuple[PortKind, int], ...]:
        """Ports that others should reach, one of each kind at most."""
        ...

    def refused(self) -> tuple[RefusedPeer, ...]:
        """Peers that take us for none of their mesh."""
        ...

    def bootstrap(self) -> tuple[BootstrapSeen, ...]:
        """The bootstrap nodes in use."""
        ...

    def facts(self) -> PeerFacts:
        """The rest: `control`, `joined`, `mesh`, `mesh_name`, `certificate_left_s`, `copies`."""
        ...

    async def machine(self) -> MachineFacts:
        """The machine; takes no longer than the rungs' look."""
        ...


class Doctor:
    """See the module."""

    def __init__(self, patient: Patient, ladder: Ladder, look_back: LookBack) -> None:
        self._patient, self._ladder, self._look_back = patient, ladder, look_back
        self._one_visit = trio.Lock()

    async def visit(self, step: Step) -> Diagnosis:
        """Everything, in order. Raises nothing of its own: what cannot be had is a finding, or is left out."""
        async with self._one_visit:
            began = trio.current_time()
            await step("looking at this machine and climbing the rungs of discovery")
            machine = await self._look()
            online = self._patient.online()
            asked = online[:MAX_ASKED]
            if asked:
                await step(f"asking {len(asked)} peer{'s' * (len(asked) > 1)} to look back")
            looked_back = await self._ask(asked)
            looks = self._ladder.looked()
            peer = msgspec.structs.replace(
                self._patient.facts(),
                rungs=tuple(RungLook(report, *looks.get(report.name, (0, None))) for report in self._ladder.reports()),
                online=len(online),
                looked_back=looked_back,
                not_asked=len(online) - len(asked),
                refused=self._patient.refused(),
                bootstrap=self._patient.bootstrap(),
            )
            return diagnose(Facts(machine, peer), trio.current_time() - began)

    async def _look(self) -> MachineFacts:
        self._ladder.look()
        found: list[MachineFacts] = []

        async def look_at_machine() -> None:
            found.append(await self._patient.machine())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_at_machine)
            with trio.move_on_after(LOOK_S):
                while not self._all_found():  # noqa: ASYNC110  rungs are looked at from outside, as a person would
                    await trio.sleep(LOOK_STEP_S)
        return found[0]

    def _all_found(self) -> bool:
        climbing = {report.name for report in self._ladder.reports() if report.state != "off"}
        found = {name for name, (count, _) in self._ladder.looked().items() if count}
        return bool(climbing) and climbing <= found

    async def _ask(self, views: tuple[PeerView, ...]) -> tuple[LookedBack, ...]:
        ports = self._patient.ports()
        told: dict[int, LookedBack] = {}

        async def ask(number: int, view: PeerView) -> None:
            name = (view.status.name if view.status else "") or view.peer_id[-8:]
            told[number] = await self._look_back.ask(view.peer_id, name, ports)

        async with trio.open_nursery() as nursery:
            for number, view in enumerate(views):
                nursery.start_soon(ask, number, view)
        return tuple(told[number] for number in sorted(told))
