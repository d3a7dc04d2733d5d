"""NATs and the internet between them, in memory and virtual time: packets of TCP and UDP, each a function call later.

A `SimNat` maps and filters by the words of RFC 4787, keeps source ports or not, may drop UDP, let out certain ports only, answer
what it did not expect with a reset, and send back what is meant for itself (hairpin). KINDS are those of the laboratory
(tests/natlab). `SimInternet` delivers, with latency and jitter, and notes who sent to whom. Not here: what sends (sim_punch).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec

from meshmax.base.reachability import Behaviour

EI: Final = "endpoint-independent"
AD: Final = "address-dependent"
APD: Final = "address-and-port-dependent"

Protocol_ = Literal["tcp", "udp"]
Address = tuple[str, int]
T = TypeVar("T")


class Rng(Protocol):
    """A random.Random."""

    def random(self) -> float:
        """From 0 up to 1."""
        ...

    def randrange(self, start: int, stop: int) -> int:
        """A whole number."""
        ...

    def choices(self, population: Sequence[T], *, k: int) -> list[T]:
        """Some of them."""
        ...


class NatKind(msgspec.Struct, frozen=True):
    """``tcp_ports``: the only ones that are let out; () for all. ``reset``: what was not expected is refused, not dropped."""

    name: str
    mapping: Behaviour = EI
    filtering: Behaviour = APD
    keeps_port: bool = True
    udp: bool = True
    tcp_ports: tuple[int, ...] = ()
    reset: bool = False
    hairpin: bool = False


KINDS: Final = {
    kind.name: kind
    for kind in (
        NatKind("full", filtering=EI),
        NatKind("addr", filtering=AD),
        NatKind("port"),
        NatKind("sym", mapping=APD, keeps_port=False),
        NatKind("reject", reset=True),
        NatKind("noudp", udp=False),
        NatKind("corp", udp=False, tcp_ports=(80, 443)),
        NatKind("hairpin", hairpin=True),
    )
}


class Packet(msgspec.Struct, frozen=True):
    """``kind``: of TCP "syn", "syn-ack", "ack", "rst", "data"; of UDP what the sender likes."""

    protocol: Protocol_
    source: Address
    to: Address
    kind: str
    body: Any = None


class SimNat:
    """One box with one outer address."""

    def __init__(self, kind: NatKind, ip: str, random: Rng) -> None:
        self.kind, self.ip = kind, ip
        self._random = random
        self._outer: dict[tuple[Any, ...], int] = {}  # by what the mapping depends on
        self._inner: dict[tuple[Protocol_, int], Address] = {}
        self._sent: dict[tuple[Protocol_, int], set[Address]] = {}  # through each outer port

    def rebind(self, ip: str | None = None) -> None:
        """Forget every mapping, as after a restart; perhaps with another outer address."""
        self.ip = ip or self.ip
        self._outer.clear()
        self._inner.clear()
        self._sent.clear()

    def outward(self, packet: Packet) -> Packet | None:
        """As it leaves; None: it is not let out."""
        if packet.protocol == "udp" and not self.kind.udp:
            return None
        if packet.protocol == "tcp" and self.kind.tcp_ports and packet.to[1] not in self.kind.tcp_ports:
            return None
        key = (packet.protocol, packet.source, *_dependence(self.kind.mapping, packet.to))
        port = self._outer.get(key)
        if port is None:
            port = self._outer[key] = self._free_port(packet.protocol, packet.source)
            self._inner[packet.protocol, port] = packet.source
            self._sent[packet.protocol, port] = set()
        self._sent[packet.protocol, port].add(packet.to)
        return msgspec.structs.replace(packet, source=(self.ip, port))

    def inward(self, packet: Packet) -> Packet | None:
        """As it arrives inside; None: it is filtered."""
        inner = self._inner.get((packet.protocol, packet.to[1]))
        if inner is None:
            return None
        sent = self._sent[packet.protocol, packet.to[1]]
        if self.kind.filtering == APD and packet.source not in sent:
            return None
        if self.kind.filtering == AD and packet.source[0] not in {ip for ip, _ in sent}:
            return None
        return msgspec.structs.replace(packet, to=inner)

    def _free_port(self, protocol: Protocol_, source: Address) -> int:
        port = source[1] if self.kind.keeps_port else self._random.randrange(20_000, 60_000)
        while (protocol, port) in self._inner:
            port = self._random.randrange(20_000, 60_000)
        return port


def _dependence(mapping: Behaviour, to: Address) -> tuple[Any, ...]:
    return {EI: (), AD: (to[0],), APD: to}[mapping]


class SimHost:
    """A machine: behind a NAT, with a private address, or outside with a public one. ``latency_s``: to the middle of the net."""

    def __init__(self, net: SimInternet, ip: str, nat: SimNat | None, latency_s: float) -> None:
        self.net, self.ip, self.nat, self.latency_s = net, ip, nat, latency_s
        self.sockets: dict[tuple[Protocol_, int], Callable[[Packet], None]] = {}
        self._ports = 30_000

    @property
    def outer_ip(self) -> str:
        """How the world sees it."""
        return self.nat.ip if self.nat else self.ip

    def port(self) -> int:
        """A fresh one."""
        self._ports += 1
        return self._ports

    def send(self, packet: Packet) -> None:
        """From one of its ports."""
        self.net.carry(self, packet)

    def observed(self, protocol: Protocol_, port: int, observer: Address) -> Address | None:
        """What an observer says of a port of ours, had it been asked: the mapping is made. None: no answer comes."""
        packet = Packet(protocol, (self.ip, port), observer, "ask")
        if self.nat is None:
            return packet.source
        out = self.nat.outward(packet)
        return out.source if out else None


class SimInternet:
    """Time, and who is where."""

    def __init__(self, random: Rng, jitter_s: float = 0.0) -> None:
        self.now = 0.0
        self.random = random
        self.jitter_s = jitter_s
        self.contacts: set[tuple[str, Address]] = set()  # (inner IP of the sender, whom it sent to)
        self._hosts: list[SimHost] = []
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def host(self, ip: str, nat: SimNat | None, latency_s: float) -> SimHost:
        """A new one."""
        host = SimHost(self, ip, nat, latency_s)
        self._hosts.append(host)
        return host

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call it then; in the order of asking where times are equal."""
        self._count += 1
        heapq.heappush(self._calls, (max(when, self.now), self._count, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it later."""
        self.at(self.now + seconds, call)

    def run(self, until: float) -> None:
        """Let time pass: to ``until``, or until nothing is due."""
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heapq.heappop(self._calls)
            call()

    def carry(self, sender: SimHost, packet: Packet) -> None:
        """Bring a packet to whom it is for, as far as NATs let it."""
        self.contacts.add((sender.ip, packet.to))
        near = [host for host in self._hosts if host.nat is sender.nat and host.ip == packet.to[0]]
        if sender.nat is not None and near:
            self._deliver(near[0], packet, 0.0005)
            return
        out = sender.nat.outward(packet) if sender.nat else packet
        if out is None:
            return
        for host in self._hosts:
            if host.nat is None and host.ip == out.to[0]:
                self._deliver(host, out, sender.latency_s + host.latency_s)
                return
            if host.nat is not None and host.nat.ip == out.to[0]:
                if host.nat is not sender.nat or host.nat.kind.hairpin:
                    self._enter(sender, host.nat, out, sender.latency_s + host.latency_s)
                return

    def _enter(self, sender: SimHost, nat: SimNat, packet: Packet, seconds: float) -> None:
        def arrive() -> None:
            inside = nat.inward(packet)
            if inside is not None:
                host = next(host for host in self._hosts if host.nat is nat and host.ip == inside.to[0])
                self._deliver(host, inside, 0.0)
            elif nat.kind.reset and packet.kind == "syn":
                reset = Packet("tcp", packet.to, packet.source, "rst")
                self.after(seconds, lambda: self._back(sender, reset))

        self.after(seconds + self.random.random() * self.jitter_s, arrive)

    def _back(self, host: SimHost, packet: Packet) -> None:
        inside = host.nat.inward(packet) if host.nat else packet
        if inside is not None:
            self._deliver(host, inside, 0.0)

    def _deliver(self, host: SimHost, packet: Packet, seconds: float) -> None:
        def arrive() -> None:
            socket = host.sockets.get((packet.protocol, packet.to[1]))
            if socket is not None:
                socket(packet)

        self.after(seconds + (self.random.random() * self.jitter_s if seconds else 0.0), arrive)
