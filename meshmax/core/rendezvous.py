"""When a peer visits a rendezvous node, what for, and what it remembers of whom it was told there.

Rules. A registration is renewed at half of its TTL, and anew at once when the namespace or our record changes; of such visits
two may follow each other closely, since who starts soon has more addresses to tell. Who is there is asked again after half a
second, one, two, five and ten seconds, for others often start together with us; then every 30 s at first, or while nobody is
connected, then every 5 min, for news only; now and then for everybody, since news tell nobody who left. A node that fails is
visited again after growing pauses; a change of our network, or a person who asks, ends them. Each node is dealt with by
itself, so that one that lies or is dead costs the others nothing. Whom it named is named again while the registration lasts,
because other parts forget. Of one peer's records the one with the highest sequence wins. A change that comes while a visit is
under way outlasts it: what the visit told or asked was of before. Not here: the messages (wire.rendezvous), visits themselves
(services.rendezvous).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import PeerId, parse_peer_id
from meshmax.base.membership import MAX_LEARNT_BOOTSTRAP
from meshmax.core.backoff import Random, backoff_s
from meshmax.wire.multiaddr import encode_multiaddr

EARLY_S: Final = 300.0  # how long after a start or a change of the network we ask often
# Pauses after a start or a change; a question for news is some 100 bytes.
DISCOVER_SOON_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
DISCOVER_EARLY_S: Final = 30.0
DISCOVER_S: Final = 300.0
WHOLE_S: Final = 1800.0  # between questions for everybody
REPEAT_S: Final = 300.0  # a peer is named again; peers are forgotten after twice as long without a sighting
FIRST_BACKOFF_S: Final = 2.0
MAX_BACKOFF_S: Final = 300.0
MIN_PAUSE_S: Final = 1.0  # between two visits, whatever happens, but for
HASTE: Final = 2  # visits for small things that pause for HASTE_PAUSE_S only; one more each HASTE_REFILL_S
HASTE_PAUSE_S: Final = 0.2  # places at two relays, and what observers see, come within that
HASTE_REFILL_S: Final = 20.0
JITTER: Final = 0.1  # of a pause, either way, so that peers that started together do not stay together
MAX_KNOWN: Final = 2048  # peers remembered of one node; the table of peers is smaller


class Due(msgspec.Struct, frozen=True):
    """What a visit is for now."""

    register: bool
    discover: bool


class Schedule:
    """One node's. Times are monotonic seconds."""

    __slots__ = (
        "_asked_again",
        "_changed",
        "_discover_at",
        "_early_until",
        "_failures",
        "_haste",
        "_hasty_until",
        "_pause_until",
        "_random",
        "_refusals",
        "_register_at",
        "_soon",
        "_visited_at",
        "_whole_at",
        "cookie",
    )

    def __init__(self, random: Random, now: float) -> None:
        self._random = random
        self.cookie = b""  # of the last page; b"" asks for everybody
        self._register_at = self._discover_at = self._pause_until = self._hasty_until = now
        self._early_until, self._whole_at = now + EARLY_S, now + WHOLE_S
        self._failures = self._refusals = 0
        self._soon = 0  # of DISCOVER_SOON_S are over
        self._changed = False  # since our record was last sent
        self._asked_again = False  # since it was last asked who is there
        self._haste, self._visited_at = float(HASTE), now

    def due(self, now: float) -> Due | None:
        """What to visit the node for now; None: nothing."""
        if now < self.deadline():
            return None
        return Due(now >= self._register_at, now >= self._discover_at)

    def deadline(self) -> float:
        """When `due` is to be asked next."""
        small = self._haste >= 1.0 and self.cookie  # nobody asks for everybody
        return max(self._hasty_until if small else self._pause_until, min(self._register_at, self._discover_at))

    # --- events ------------------------------------------------------------------------------------------------------

    def on_record_changed(self, now: float, elsewhere: bool = False) -> None:
        """Our addresses are others: register at once, and ask for news. ``elsewhere``: the namespace is; ask for everybody."""
        self._register_at, self._changed = now, True
        self._refusals = 0
        cookie = self.cookie
        self.on_look_again(now)
        if not elsewhere:
            self.cookie = cookie  # a large mesh has many pages

    def on_look_again(self, now: float) -> None:
        """The network changed, or a person asks: ask for everybody, pauses afresh."""
        self.cookie, self._asked_again = b"", True
        self._discover_at, self._soon = now, 0
        self._early_until, self._whole_at = now + EARLY_S, now + WHOLE_S
        if self._failures:
            self._failures, self._pause_until, self._hasty_until = 0, now, now

    def on_registering(self) -> None:
        """Our record of now is about to be sent."""
        self._changed = False

    def on_registered(self, ttl_s: float, now: float) -> None:
        """The node took our registration for ``ttl_s``."""
        self._refusals = 0
        self._register_at = now if self._changed else now + self._about(max(ttl_s / 2.0, MIN_PAUSE_S))

    def on_register_refused(self, now: float) -> None:
        """The node is there but did not take our registration: try that again after a pause, the rest goes on."""
        self._refusals += 1
        self._register_at = now + backoff_s(self._refusals, FIRST_BACKOFF_S, MAX_BACKOFF_S, self._random)

    def on_register_lost(self, now: float) -> None:
        """The node does not know us any more."""
        self._register_at = now

    def on_nothing_to_register(self, now: float) -> None:
        """We have no address to tell; `on_record_changed` comes when there is one."""
        self._register_at = now if self._changed else now + MAX_BACKOFF_S

    def on_discovering(self) -> bytes:
        """A question for who is there is about to be sent; the cookie to ask with."""
        self._asked_again = False
        return self.cookie

    def on_discovered(self, cookie: bytes, alone: bool, now: float) -> None:
        """The node told all that it has; ``cookie`` asks for what comes later. ``alone``: no member is connected to us."""
        self._failures = 0
        if self._asked_again:
            self._discover_at = now
            return
        self.cookie = cookie
        if now >= self._whole_at:
            self.cookie, self._whole_at = b"", now + WHOLE_S
        if self._soon < len(DISCOVER_SOON_S):
            pause_s = DISCOVER_SOON_S[self._soon]
            self._soon += 1
        else:
            pause_s = DISCOVER_EARLY_S if alone or now < self._early_until else DISCOVER_S
        self._discover_at = now + self._about(pause_s)

    def on_visited(self, now: float) -> None:
        """A visit ended well."""
        self._failures = 0
        hasty = now < self._pause_until
        self._haste = min(self._haste - hasty + (now - self._visited_at) / HASTE_REFILL_S, HASTE)
        self._visited_at, self._pause_until, self._hasty_until = now, now + MIN_PAUSE_S, now + HASTE_PAUSE_S

    def on_failed(self, now: float) -> None:
        """A visit failed; what was due stays due. A node that was restarted does not know us any more."""
        self._failures += 1
        self._register_at = min(self._register_at, now)
        self._discover_at = min(self._discover_at, now)
        pause_s = backoff_s(self._failures, FIRST_BACKOFF_S, MAX_BACKOFF_S, self._random)
        self._pause_until = self._hasty_until = now + pause_s

    def _about(self, pause_s: float) -> float:
        return pause_s * (1.0 + JITTER * (2.0 * self._random.random() - 1.0))


class Told(msgspec.Struct):
    """A peer of which a node told us. ``record`` is the envelope, as it came."""

    peer_id: PeerId
    record: bytes
    sequence: int
    addresses: tuple[str, ...]
    expires_at: float
    named_at: float = float("-inf")


class Known:
    """Whom one node told us of; at most MAX_KNOWN, those heard of longest ago are forgotten first."""

    __slots__ = ("_records", "_told")

    def __init__(self) -> None:
        self._told: dict[PeerId, Told] = {}
        self._records: dict[bytes, PeerId] = {}

    def __len__(self) -> int:
        return len(self._told)

    def renew(self, record: bytes, expires_at: float) -> bool:
        """Whether this very record is known, and so need not be verified again; it lasts until ``expires_at`` then."""
        peer_id = self._records.get(record)
        if peer_id is None:
            return False
        told = self._told[peer_id] = self._told.pop(peer_id)
        told.expires_at = expires_at
        return True

    def add(self, told: Told) -> None:
        """A verified record; nothing happens where a newer one of its peer is known."""
        old = self._told.get(told.peer_id)
        if old and old.sequence > told.sequence:
            return
        if old:
            self._forget(old)
            if old.addresses == told.addresses:
                told.named_at = old.named_at
        self._told[told.peer_id] = told
        self._records[told.record] = told.peer_id
        if len(self._told) > MAX_KNOWN:
            self._forget(next(iter(self._told.values())))

    def sequence(self, peer_id: PeerId) -> int:
        """The highest one known of the peer, -1 for none."""
        told = self._told.get(peer_id)
        return told.sequence if told else -1

    def take_due(self, now: float, others: Sequence[Known]) -> list[Told]:
        """Those to be named now, as news or again; they count as named. Peers of which ``others`` know newer are left out."""
        for told in [told for told in self._told.values() if told.expires_at <= now]:
            self._forget(told)
        due = [told for told in self._told.values() if now - told.named_at >= REPEAT_S]
        for told in due:
            told.named_at = now
        return [told for told in due if all(other.sequence(told.peer_id) <= told.sequence for other in others)]

    def name_all_again(self) -> None:
        """The network changed: all are due."""
        for told in self._told.values():
            told.named_at = float("-inf")

    def clear(self) -> None:
        """Another namespace: nobody of the old one is meant any more."""
        self._told.clear()
        self._records.clear()

    def _forget(self, told: Told) -> None:
        del self._told[told.peer_id]
        del self._records[told.record]


def bootstrap_nodes(texts: Iterable[str]) -> dict[PeerId, tuple[str, ...]]:
    """Addresses (without /p2p) by PeerId of the bootstrap nodes that a person gave. Raises ConfigError."""
    nodes: dict[PeerId, tuple[str, ...]] = {}
    for text in texts:
        address, _, last = text.rpartition("/p2p/")
        try:
            peer_id = parse_peer_id(last)
            encode_multiaddr(address)
        except InvalidRequest:
            raise ConfigError(
                f"'{text[:120]}' is not the address of a bootstrap node: write /ip4/ADDRESS/tcp/PORT/p2p/PEER-ID, or /dns/NAME "
                "instead of /ip4/ADDRESS (`meshmax bootstrap` over there shows it)"
            ) from None
        nodes[peer_id] = tuple(dict.fromkeys((*nodes.get(peer_id, ()), address)))
    return nodes


def learnt_bootstrap(named: Iterable[str], before: Iterable[str] = ()) -> tuple[str, ...]:
    """What to keep of the addresses that a ticket names, and of those kept ``before``: the newest MAX_LEARNT_BOOTSTRAP.

    What is no address of a bootstrap node is left out: a ticket is somebody else's word.
    """
    return tuple(dict.fromkeys(text for text in (*named, *before) if _is_node(text)))[:MAX_LEARNT_BOOTSTRAP]


def _is_node(text: str) -> bool:
    try:
        bootstrap_nodes((text,))
    except ConfigError:
        return False
    return True


def told_addresses(own: Iterable[str], node: Iterable[str]) -> tuple[str, ...]:
    """Which of our addresses to tell at a node reached at ``node``: loopback ones only where the node is on loopback."""
    local = any(_is_loopback(address) for address in node)
    return tuple(address for address in own if local or not _is_loopback(address))


def _is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/", "/dns/localhost/", "/dns4/localhost/", "/dns6/localhost/"))
