"""What the doctor looks at and what it says: facts, findings.

A fact is something seen, never a judgement; what is not known (yet, or on this machine) is None or empty and leads to no
finding. Not here: what follows from facts (core.doctor), how they are gathered (services.doctor), how they are printed (cli).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.discovery import RungReport, SeenBy
from meshmax.base.ids import PeerId

Severity = Literal["ok", "warning", "error"]
PortKind = Literal["control", "lane", "udp"]
# open: somebody took the connection; refused: the machine says nobody listens; silent: nothing came back in time (a firewall
# that drops); unreachable: no way there; arrived and lost: of a datagram; not_tried: the asked peer would or could not.
PortOutcome = Literal["open", "refused", "silent", "unreachable", "sent", "arrived", "lost", "not_tried"]


class Finding(msgspec.Struct, frozen=True):
    """``code`` is stable (docs/troubleshooting has a row for each); ``advice`` says what to do, '' where all is well."""

    code: str
    severity: Severity
    sentence: str
    advice: str = ""


class RungLook(msgspec.Struct, frozen=True):
    """A rung, and what it found while the doctor looked: so many peers, the first after ``first_s`` seconds."""

    report: RungReport
    found_now: int = 0
    first_s: float | None = None


class PortSeen(msgspec.Struct, frozen=True):
    """A port of ours as another peer found it. ``address`` is IP:PORT as the other tried it."""

    kind: PortKind
    port: int
    outcome: PortOutcome


class LookedBack(msgspec.Struct, frozen=True):
    """What a connected peer says of us, beside what we see of it.

    ``why``: a sentence where it did not answer, and then the rest is empty. ``theirs``: rungs of it that saw us; ``ours``: rungs
    of ours that saw it. ``address``: the multiaddr that it sees us come from. ``clock_ahead_s``: its clock against ours,
    ``uncertain_s`` either way.
    """

    peer_id: PeerId
    name: str
    direction: Literal["in", "out"]
    why: str = ""
    ours: tuple[SeenBy, ...] = ()
    theirs: tuple[SeenBy, ...] = ()
    their_rungs: tuple[str, ...] = ()
    address: str = ""
    clock_ahead_s: float | None = None
    uncertain_s: float = 0.0
    ports: tuple[PortSeen, ...] = ()
