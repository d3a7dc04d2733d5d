"""What the table of peers holds of each: the words that core.peers writes and core.neighbours and core.gossip read."""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import ModelPresence, Path, PeerStatus

MAX_WHY: Final = 200  # characters kept of an address that failed, and of a cause


class Dial(msgspec.Struct, frozen=True):
    """Connect to this peer at one of these addresses; report with on_connected, on_dial_failed or on_refused."""

    peer_id: PeerId
    addresses: tuple[str, ...]


class Refusal(msgspec.Struct, frozen=True):
    """A peer that takes us for none of its mesh: where it was dialled, what it said, when (monotonic seconds)."""

    peer_id: PeerId
    address: str
    reason: str
    at: float


class PeerEntry(msgspec.Struct):
    """What the table knows of a peer. Times are monotonic seconds; only PeerTable writes."""

    peer_id: PeerId
    last_sign_at: float
    key: bytes = b""  # by which notices name it
    lot: float = 0.0  # drawn once: who is kept at random
    addresses: tuple[str, ...] = ()
    signed: Signed | None = None
    status: PeerStatus | None = None
    warm: PeerStatus | None = None  # as the peer told it before it was lost, while ``status`` is the cold of it
    seen: bool = False  # it was seen by its own sign (mDNS), or connected, or a person named it
    named: bool = False  # a list of peers named it; neither seen nor named: we know it by hearsay
    asked: bool = False  # a person gave its address
    proven: bool = False  # it answered a heartbeat once: it is one of us
    tellers: tuple[PeerId, ...] = ()  # neighbours that say that it is their neighbour, some of them
    connected: bool = False
    chosen: bool = False  # connected because we dialled it
    connected_at: float = 0.0
    alive_at: float | None = None  # its last sign of life on a connection
    leaving: bool = False  # it said farewell
    had: tuple[ModelPresence, ...] = ()  # the models that it told before its farewell, which names none
    parted: bool = False  # it has too many neighbours, or we have
    address: str = ""
    path: Path = "direct"  # how the connection gets there
    dialled: bool = False  # that connection was made by us
    rtt_s: float | None = None
    used_at: float | None = None  # when streams beside the heartbeat were last seen open
    failures: int = 0
    dial_at: float | None = None
    dialing: bool = False
    news: bool = False  # other addresses were told, or our network changed, while it is dialled as of before
    again: bool = False  # there is new hope of reaching it since that dial began
    trial: bool = False  # may be dialled although there are enough neighbours, to see whether it is a better one
    refusal: Refusal | None = None
    why: str = ""  # the last dial failed; and by address, as far as that is known
    tried: tuple[tuple[str, str], ...] = ()


def cause_of(entry: PeerEntry, address: str) -> str:
    """Why the last dial did not reach the peer at ``address``; '' if it is connected, refused us or was not dialled."""
    if entry.connected or entry.refusal:
        return ""
    return dict(entry.tried).get(address[:MAX_WHY], entry.why)


def changed_of(status: PeerStatus) -> int:
    """The number by which a notice tells this status' lasting facts from earlier ones; never GONE."""
    return status.changed or status.sequence or 1
