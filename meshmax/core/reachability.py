"""Where we stand: what follows from what observers saw of us in one look, and when the next look is due.

Observers may err and lie. Rules. Only the farthest ones count: what a machine on our LAN sees says nothing about the internet
(`scope_of`). Each source (core.subnets) has one voice on whether we are reached: what most say holds, of a tie the worse; where
one alone was asked its word counts and ``why`` says so. Mapping and filtering are told as in RFC 5780, 4.3 and 4.4, from one
port each: the same mapping at most observers' addresses is endpoint-independent; where they differ and nobody was asked at
two ports, the worse is assumed. Reached at an address of an interface of ours we are public, at another one mapped. What was
reached, as UDP that was open, is given up after LOSSES looks in a row that say so, CONFIRM_S apart; what was not is reached at
once. Where one of several answered in time, which tells no mapping, all are asked again after CONFIRM_S, once. On another
network nothing of before counts. What happens during a look may have come after its answers, so it brings another one. Not
here: asking (services.reachability), remembering networks (store.networks_file).
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from meshmax.base.doctor import TriedOutcome
from meshmax.base.ids import PeerId
from meshmax.base.reachability import UNKNOWN, Behaviour, NatBehaviour, PortMapping, Reachability, ReachState, UdpState
from meshmax.core.subnets import source_of

LOOK_EVERY_S: Final = 600.0  # mappings of routers and addresses of carriers change within hours
RETRY_S: Final = (5.0, 600.0)  # first and longest pause while no observer answers
CONFIRM_S: Final = 15.0  # until a look that found us lost is repeated: an observer may have been restarted
BLOCKED_EVERY_S: Final = 120.0  # while UDP is blocked: some portals open it once somebody has logged in
LOSSES: Final = 2  # looks in a row
SETTLE_S: Final = 1.0  # from a change (of the network, of mappings) to the look: changes come in groups
DOUBTS: Final = 2  # neighbours that could not reach us within LOOK_EVERY_S, before we look again
TOGETHER_S: Final = 15.0  # in which connections are lost that one fault cuts: heartbeats end them after 6 s
DOUBT_PAUSE_S: Final = 60.0  # between the beginnings of looks for the reason that neighbours did not reach us
LOST_PAUSE_S: Final = 15.0  # likewise, for the reason that they were lost
MAX_DOUBTERS: Final = 16  # remembered

Address = tuple[str, int]  # (ip, port)
K = TypeVar("K", bound=Hashable)

_SITE: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)


class SeenFrom(msgspec.Struct, frozen=True):
    """The node at ``observer`` sees us come from ``ip``."""

    observer: str
    ip: str


class MappedSeen(msgspec.Struct, frozen=True):
    """Asked at ``observer``, it saw our ``local_port`` as ``mapped``. All of one look and protocol have one local port."""

    observer: Address
    local_port: int
    mapped: Address


class FilterSeen(msgspec.Struct, frozen=True):
    """What arrived at a port that has talked to one observer alone: from where it talked to (``control``), from another port
    of that observer, from another observer. None: not tried, or nobody sent it.
    """

    control: bool | None = None
    other_port: bool | None = None
    other_ip: bool | None = None


class DialledBack(msgspec.Struct, frozen=True):
    """What came of a connection from ``observer`` to ``at``, where it sees us."""

    observer: str
    at: Address
    outcome: TriedOutcome


class Look(msgspec.Struct, frozen=True):
    """All of one look. ``own``: IP addresses of our interfaces, without loopback; ``udp_asked``: STUN servers' IP addresses;
    ``control_port``: where we listen; ``visited``: how many nodes were, whether they answered or not.
    """

    own: tuple[str, ...] = ()
    control_port: int = 0
    seen: tuple[SeenFrom, ...] = ()
    udp: tuple[MappedSeen, ...] = ()
    udp_asked: tuple[str, ...] = ()
    filtering: FilterSeen = FilterSeen()
    tcp: tuple[MappedSeen, ...] = ()
    dialled: tuple[DialledBack, ...] = ()
    mappings: tuple[PortMapping, ...] = ()
    visited: int = 0

    @property
    def answered(self) -> bool:
        """Whether any observer said anything."""
        return bool(self.seen or self.udp or self.tcp or self.dialled)


# --- one look --------------------------------------------------------------------------------------------------------


def scope_of(ip: str) -> int:
    """How far away ``ip`` may be: 0 this machine, 1 this link, 2 this site or carrier (RFC 1918, 4193, 6598), 3 anywhere.

    -1 for what is no address.
    """
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return -1
    if address.is_loopback:
        return 0
    if address.is_link_local:
        return 1
    return 2 if any(address in network for network in _SITE) else 3


def judge(look: Look) -> Reachability:
    """What follows from one look by itself."""
    farthest = max((scope_of(ip) for ip in _observers(look)), default=-1)
    look = _only(look, lambda ip: scope_of(ip) == farthest)
    nat = NatBehaviour(
        _udp_state(look), mapping_of(look.udp, look.own), filtering_of(look.filtering), mapping_of(look.tcp, look.own)
    )
    external = _external_ips(look)
    state, why, addresses = _reached(look)
    if not look.answered:
        why = "no bootstrap node or other observer answered"
    return Reachability(state, why, nat, external, addresses, look.mappings)


def mapping_of(seen: Sequence[MappedSeen], own: Sequence[str]) -> Behaviour:
    """RFC 5780, 4.3. ``own``: without loopback, which is ours anyway. Of IPv4 where there is any: IPv6 is seldom translated."""
    seen = [each for each in seen if ":" not in each.observer[0]] or list(seen)
    by_ip: dict[str, list[Address]] = {}
    for each in seen:
        by_ip.setdefault(each.observer[0], []).append(each.mapped)
    as_ours = {e.observer[0] for e in seen if is_own(e.mapped[0], own) and e.mapped[1] == e.local_port}
    if len(as_ours) * 2 > len(by_ip):
        return "endpoint-independent"  # nothing is between
    agreeing = Counter(mapped for each in by_ip.values() for mapped in set(each))
    if any(count > 1 and count * 2 > len(by_ip) for count in agreeing.values()):
        return "endpoint-independent"
    twice = [mapped for mapped in by_ip.values() if len(mapped) > 1]
    if any(len(set(mapped)) > 1 for mapped in twice):
        return "address-and-port-dependent"
    if len(by_ip) < 2:
        return "unknown"
    return "address-dependent" if twice else "address-and-port-dependent"


def filtering_of(seen: FilterSeen) -> Behaviour:
    """RFC 5780, 4.4."""
    if seen.other_ip:
        return "endpoint-independent"
    if seen.control is not True:  # then silence proves nothing
        return "unknown"
    if seen.other_port is False:
        return "address-and-port-dependent"
    return "address-dependent" if seen.other_port and seen.other_ip is False else "unknown"


def is_own(ip: str, own: Sequence[str]) -> bool:
    """Whether ``ip`` is an address of this machine, loopback included."""
    return ip in own or scope_of(ip) == 0


def _observers(look: Look) -> set[str]:
    return {
        *(each.observer for each in look.seen),
        *(each.observer[0] for each in look.udp),
        *(each.observer[0] for each in look.tcp),
        *(each.observer for each in look.dialled),
    }


def _only(look: Look, counts: Callable[[str], bool]) -> Look:
    return msgspec.structs.replace(
        look,
        seen=tuple(each for each in look.seen if counts(each.observer)),
        udp=tuple(each for each in look.udp if counts(each.observer[0])),
        udp_asked=tuple(ip for ip in look.udp_asked if counts(ip)),
        tcp=tuple(each for each in look.tcp if counts(each.observer[0])),
        dialled=tuple(each for each in look.dialled if counts(each.observer)),
    )


def _voices(words: Iterable[tuple[str, K]]) -> Counter[K]:
    """How many sources say each thing; ``words``: (observer's IP address, what it says)."""
    return Counter(said for _, said in {(source_of(ip), said) for ip, said in words})


def _udp_state(look: Look) -> UdpState:
    if look.udp:
        return "open"
    # That nothing came back says something only where the way there is open otherwise.
    return "blocked" if look.udp_asked and (look.seen or look.tcp) else "unknown"


def _external_ips(look: Look) -> tuple[str, ...]:
    """Of each family what most name; several, where they are named as often (a NAT with a pool of addresses)."""
    words = [(each.observer, each.ip) for each in look.seen]
    words += [(each.observer[0], each.mapped[0]) for each in (*look.udp, *look.tcp)]
    found: list[str] = []
    for of_ipv6 in (False, True):
        voices = _voices((observer, ip) for observer, ip in words if (":" in ip) is of_ipv6)
        found += sorted(ip for ip, count in voices.items() if count == max(voices.values()))
    return tuple(found)


def _reached(look: Look) -> tuple[ReachState, str, tuple[str, ...]]:
    """The state, why, and the multiaddrs at which most reached us."""
    tried = [each for each in look.dialled if each.outcome != "not_tried"]
    voices: dict[Address, dict[str, list[bool]]] = {}
    for each in tried:
        voices.setdefault(each.at, {}).setdefault(source_of(each.observer), []).append(each.outcome == "open")
    reached = [at for at, said in voices.items() if _most(_most(voice) for voice in said.values())]
    said_by = {source_of(each.observer) for each in tried}
    asked = len(said_by)
    lone = "the only observer that was asked"
    if len({each.observer for each in tried}) > 1:
        lone = "all observers that were asked, of one network,"  # which count as one
    who = lone if asked == 1 else f"{asked} observers"
    public = [at for at in reached if is_own(at[0], look.own) and at[1] == look.control_port]
    mapped = [at for at in reached if not is_own(at[0], look.own)]
    addresses = tuple(_multiaddr(at) for at in (*public, *mapped))
    if public:
        return "public", f"{who} reached us at {_text(public[0])}, an address of this machine", addresses
    if mapped:
        return "mapped", f"{who} reached us at {_text(mapped[0])}, which is forwarded to this machine", addresses
    if tried:
        behind = any(not is_own(each.at[0], look.own) for each in tried)
        where = f"we come from {tried[0].at[0]}, no address of this machine" if behind else "something drops it"
        return "private", f"{who} could not connect to us: {where}", ()
    return "unknown", "nobody outside tried to connect to us", ()


def _most(words: Iterable[bool]) -> bool:
    said = list(words)
    return sum(said) * 2 > len(said)


def _multiaddr(at: Address) -> str:
    return f"/ip{6 if ':' in at[0] else 4}/{at[0]}/tcp/{at[1]}"


def _text(at: Address) -> str:
    return f"[{at[0]}]:{at[1]}" if ":" in at[0] else f"{at[0]}:{at[1]}"


# --- over time -------------------------------------------------------------------------------------------------------


class Whereabouts:
    """See the module. Times are monotonic seconds."""

    __slots__ = (
        "_alone",
        "_blocked",
        "_doubts",
        "_due",
        "_failed",
        "_looked",
        "_losses",
        "_lost",
        "_meanwhile",
        "_own",
        "_settled",
        "view",
    )

    def __init__(self, now: float) -> None:
        self.view: Reachability = UNKNOWN
        self._due = self._looked = now
        self._meanwhile = math.inf  # when a look is due for what happened since the last one began
        self._failed = self._lost = self._blocked = 0  # looks in a row
        self._alone = 0  # likewise, in which one observer of several answered
        self._own: tuple[str, ...] = ()
        self._doubts: dict[PeerId, float] = {}  # neighbours that could not reach us, and when, oldest first
        self._losses: dict[PeerId, float] = {}  # likewise, connections that were lost
        self._settled = False  # whether a look on this network brought anything

    def deadline(self) -> float:
        """When the next look is due."""
        return self._due

    def begin(self, now: float) -> None:
        """A look begins; `on_look` may follow."""
        self._looked, self._meanwhile = now, math.inf

    def on_seen(self, look: Look) -> bool:
        """The first half of a look: from where we come. The rest takes seconds; whether the view is another one now."""
        before, found = self.view, judge(look).external_ips
        if found:
            self.view = msgspec.structs.replace(before, external_ips=found)
        return self.view != before

    def on_look(self, look: Look, now: float) -> bool:
        """What a look brought; whether the view is another one now."""
        before = self.view
        if look.answered:
            self._take(look, now)
        else:
            self._failed += 1
            self._due = now + min(RETRY_S[0] * 2 ** min(self._failed - 1, 10), RETRY_S[1])
            if self._failed >= LOSSES or not self._settled:
                self.view = judge(look)
        self._due = min(self._due, self._meanwhile)
        return self.view != before

    def _take(self, look: Look, now: float) -> None:
        before, found = self.view, judge(look)
        self._failed, self._due = 0, now + LOOK_EVERY_S
        self._doubts = {peer_id: at for peer_id, at in self._doubts.items() if at >= self._looked}
        self._own = look.own
        lost = before.state in ("public", "mapped") and found.state in ("private", "unknown")
        self._lost = self._lost + 1 if lost else 0
        if lost and self._lost < LOSSES and self._settled:
            self._due = now + CONFIRM_S
            found = msgspec.structs.replace(found, state=before.state, why=before.why, addresses=before.addresses)
        self._blocked = self._blocked + 1 if found.nat.udp == "blocked" else 0
        if 0 < self._blocked < LOSSES and before.nat.udp == "open" and self._settled:
            self._due = now + CONFIRM_S
            found = msgspec.structs.replace(found, nat=before.nat)
        elif self._blocked:
            self._due = now + BLOCKED_EVERY_S
        self._alone = self._alone + 1 if len(look.seen) == 1 < look.visited else 0
        if self._alone == 1:
            self._due = now + CONFIRM_S
        self.view, self._settled = found, True

    def on_network_change(self, own: Sequence[str], now: float) -> bool:
        """We are, or may be, on another network: look again, and take what comes at its word; whether the view changed."""
        before, self._due = self.view, now + SETTLE_S
        self._failed = self._lost = self._blocked = self._alone = 0
        self._settled = False
        self._doubts = {}
        if set(own) != set(self._own):
            self.view = msgspec.structs.replace(UNKNOWN, why="the network changed; nobody outside was asked since")
        return self.view != before

    def on_mappings(self, now: float) -> None:
        """Ports were mapped, or are no longer: look whether others reach us so."""
        self._due = min(self._due, now + SETTLE_S)

    def on_lost(self, peer_id: PeerId, now: float, left: Collection[PeerId]) -> None:
        """The connection to a peer, or a relay, was lost: where several are at once, a router may have another address.

        ``left``: whose connections still stand. One loss is enough where there is none but of those that were lost just now.
        """
        self._losses.pop(peer_id, None)
        self._losses[peer_id] = now
        while len(self._losses) > MAX_DOUBTERS:
            del self._losses[next(iter(self._losses))]
        lately = {each for each, at in self._losses.items() if now - at <= TOGETHER_S}
        if len(lately) >= DOUBTS or lately.issuperset(left):
            self._by(max(now + SETTLE_S, self._looked + LOST_PAUSE_S))

    def on_unreached(self, peer_id: PeerId, now: float) -> None:
        """A neighbour could not connect to us, where it should have been able to."""
        if self.view.state not in ("public", "mapped"):
            return
        self._doubts.pop(peer_id, None)
        self._doubts[peer_id] = now
        if len(self._doubts) > MAX_DOUBTERS:
            del self._doubts[next(iter(self._doubts))]
        if sum(now - at < LOOK_EVERY_S for at in self._doubts.values()) >= DOUBTS:
            self._by(max(now, self._looked + DOUBT_PAUSE_S))

    def _by(self, at: float) -> None:
        """A look is due by then, and what one brings that has begun does not change that."""
        self._due, self._meanwhile = min(self._due, at), min(self._meanwhile, at)
