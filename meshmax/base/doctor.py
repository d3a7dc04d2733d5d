"""What the doctor looks at and what it says: facts, findings.

A fact is something seen, never a judgement; what is not known (yet, or on this machine) is None or empty and leads to no
finding. Not here: what follows from facts (core.doctor), how they are gathered (services.doctor), how they are printed (cli).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.discovery import RungReport, SeenBy
from meshmax.base.ids import PeerId
from meshmax.base.membership import BootstrapSource
from meshmax.base.reachability import NatBehaviour, Reachability

Severity = Literal["ok", "warning", "error"]
PortKind = Literal["control", "lane", "udp"]
# open: somebody took the connection; refused: the machine says nobody listens; silent: nothing came back in time (a firewall
# that drops); unreachable: no way there; arrived and lost: of a datagram; not_tried: the asked peer would or could not.
TriedOutcome = Literal["open", "refused", "silent", "unreachable", "sent", "not_tried"]  # as who tried tells it
PortOutcome = Literal[
    "open", "refused", "silent", "unreachable", "arrived", "lost", "not_tried"
]  # as the asker knows it


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
    """A port of ours as another peer found it."""

    kind: PortKind
    port: int
    outcome: PortOutcome


class LookedBack(msgspec.Struct, frozen=True):
    """What a connected peer says of us, beside what we see of it.

    ``why``: a sentence where it did not answer, and then the rest is empty. ``theirs``: rungs of it that saw us; ``ours``: rungs
    of ours that saw it; ``their_rungs``: those that it climbs. ``at``: the multiaddr at which we see it, ``address``: the one
    that it sees us come from; '' in either where a relay stands between. ``relayed_s``: for how many seconds a relay has, None
    where there is none. ``clock_ahead_s``: its clock against ours, ``uncertain_s`` either way.
    ``nat``: what its NAT does by its word, None where it does not tell.
    """

    peer_id: PeerId
    name: str
    direction: Literal["in", "out"]
    why: str = ""
    ours: tuple[SeenBy, ...] = ()
    theirs: tuple[SeenBy, ...] = ()
    their_rungs: tuple[str, ...] = ()
    at: str = ""
    address: str = ""
    clock_ahead_s: float | None = None
    uncertain_s: float = 0.0
    ports: tuple[PortSeen, ...] = ()
    relayed_s: float | None = None
    nat: NatBehaviour | None = None


class BootstrapSeen(msgspec.Struct, frozen=True):
    """A bootstrap node in use, by its address. ``problem`` '' where it answers; ``source``: who named it."""

    address: str
    problem: str = ""
    source: BootstrapSource = "config"


class RefusedPeer(msgspec.Struct, frozen=True):
    """A peer that takes us for none of its mesh, and what it said."""

    peer_id: PeerId
    address: str
    reason: str
    name: str = ""


class GivenSeen(msgspec.Struct, frozen=True):
    """An address given by --join. ``problem``: why it was not reached when it was dialled last; '' where nothing is wrong."""

    address: str
    problem: str = ""


class LocalPort(msgspec.Struct, frozen=True):
    """A port that a peer here would use. ``holder``: who has it ('' nobody, so that it is free)."""

    what: str
    port: int
    holder: str = ""


class MachineFacts(msgspec.Struct, frozen=True):
    """This machine and this home, with or without a peer that runs.

    ``networks``: IP addresses beside loopback. ``mdns_problem``, ``engine_problem``, ``home_problem``, ``identity_problem``: a
    sentence, '' where all is well. ``clock_back_s``: by how much the clock is behind the last use of this home.
    """

    home: str
    networks: tuple[str, ...] = ()
    ports: tuple[LocalPort, ...] = ()
    mdns_problem: str = ""
    engine_problem: str = ""
    home_problem: str = ""
    identity_problem: str = ""
    clock_back_s: float = 0.0
    disk_free_bytes: int | None = None


class PeerFacts(msgspec.Struct, frozen=True):
    """A peer that runs, as it sees itself and is seen.

    ``online``: peers connected. ``control``: IP addresses and ports where it takes connections. ``mesh`` '' the open one;
    ``mesh_problem``: what is wrong with our membership, a sentence.
    ``certificate_left_s``: until ours expires, None where there is none. ``copies``: sentences on a second machine that has our
    identity. ``joined``: how many addresses were given by --join; ``given``: how each stands.
    ``reachability``: as others outside see this peer; ``relays``: what people call those that keep a place for it.
    """

    rungs: tuple[RungLook, ...] = ()
    online: int = 0
    looked_back: tuple[LookedBack, ...] = ()
    not_asked: int = 0
    refused: tuple[RefusedPeer, ...] = ()
    bootstrap: tuple[BootstrapSeen, ...] = ()
    control: tuple[str, ...] = ()
    joined: int = 0
    mesh: str = ""
    mesh_name: str = ""
    mesh_problem: str = ""
    certificate_left_s: float | None = None
    copies: tuple[str, ...] = ()
    given: tuple[GivenSeen, ...] = ()
    reachability: Reachability | None = None
    relays: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True):
    """Everything that a visit brought to light. ``peer`` None: none runs here."""

    machine: MachineFacts
    peer: PeerFacts | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    """What the doctor says. ``well``: no finding but ok ones. ``took_s``: seconds of the visit."""

    well: bool
    findings: tuple[Finding, ...]
    facts: Facts
    took_s: float = 0.0
