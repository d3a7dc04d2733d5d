"""Simultaneous open of TCP and ICE's connectivity checks, as packets through testing.sim_nat.

`SimTcpPort` does what net.punch does: it listens from its birth, connects to each target again and again, and hands on every
connection. `SimIce` gathers a host and a server-reflexive candidate, sends checks at the intervals of RFC 8489 (6.2.1), answers
others' checks, learns peer-reflexive candidates from them (RFC 8445, 7.3.1.3); who leads nominates. A `SimLink` is one end of
what comes of either. Not here: agreeing on an attempt (sim_traversal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from meshmax.base.traversal import Candidate
from meshmax.testing.sim_nat import Address, Packet, Protocol_, SimHost

TRIES: Final = 6  # of net.punch
RETRY_S: Final = 0.3
RETRY_MORE_S: Final = 0.2
PAUSE_S: Final = 0.05
CHECKS_S: Final = (0.0, 0.5, 1.5, 3.5)  # RFC 8489, 6.2.1, from the first
SECURED_S: Final = 0.15  # DTLS and SCTP
UNANSWERED_S: Final = 5.0  # how long aioice waits for STUN that does not come


class SimLink:
    """One end of a connection. ``receive`` is called with what the other end sends, once it is set."""

    def __init__(self, host: SimHost, protocol: Protocol_, local: Address, remote: Address) -> None:
        self.protocol, self.remote = protocol, remote
        self._host, self._local = host, local
        self._early: list[Any] = []
        self._receive: Callable[[Any], None] | None = None
        self.closed = False

    def send(self, body: Any) -> None:
        """To the other end; lost where the path is."""
        if not self.closed:
            self._host.send(Packet(self.protocol, self._local, self.remote, "data", body))

    def listen(self, receive: Callable[[Any], None]) -> None:
        """From now on, and what came before."""
        self._receive = receive
        early, self._early = self._early, []
        for body in early:
            receive(body)

    def arrived(self, body: Any) -> None:
        """Something came."""
        if self.closed:
            return
        if self._receive is None:
            self._early.append(body)
        else:
            self._receive(body)


class SimTcpPort:
    """See the module. ``found`` is called with each connection once `run` was."""

    def __init__(self, host: SimHost, found: Callable[[SimLink], None]) -> None:
        self.host, self.port = host, host.port()
        self.local: Address = (host.ip, self.port)
        self._found = found
        self._links: dict[Address, SimLink] = {}
        self._half: set[Address] = set()
        self._tried: dict[Address, int] = {}
        self._waiting: list[SimLink] = []
        self._runs = self._over = False
        host.sockets["tcp", self.port] = self._on_packet

    def candidates(self, observer: Address) -> tuple[Candidate, ...]:
        """Ours, as an observer sees them."""
        found = [Candidate("host", "tcp", self.host.ip, self.port)]
        mapped = self.host.observed("tcp", self.port, observer)
        if mapped and mapped != self.local:
            found.insert(0, Candidate("srflx", "tcp", *mapped))
        return tuple(found)

    def run(self, targets: Sequence[Candidate]) -> None:
        """Connect and accept, until `stop`."""
        self._runs = True
        for link in self._waiting:
            self._found(link)
        for target in targets:
            self._connect((target.ip, target.port), 0)

    def stop(self) -> None:
        """No more; connections stay."""
        self._over = True

    def _connect(self, to: Address, number: int) -> None:
        if self._over or to in self._links or number >= TRIES or self._tried.get(to, -1) >= number:
            return
        self._tried[to] = number
        self._send("syn", to)
        self.host.net.after(RETRY_S + RETRY_MORE_S * number, lambda: self._connect(to, number + 1))

    def _send(self, kind: str, to: Address) -> None:
        self.host.send(Packet("tcp", self.local, to, kind))

    def _on_packet(self, packet: Packet) -> None:
        other = packet.source
        if packet.kind == "data" and other in self._half and not self._over:
            self._open(other)  # it overtook the last word of the opening
        if packet.kind == "data":
            if other in self._links:
                self._links[other].arrived(packet.body)
        elif self._over:
            return
        elif packet.kind == "syn":
            self._half.add(other)
            self._send("syn-ack", other)
        elif packet.kind == "syn-ack" and (other in self._tried or other in self._half):
            self._send("ack", other)
            self._open(other)
        elif packet.kind == "ack" and other in self._half:
            self._open(other)
        elif packet.kind == "rst" and other in self._tried and other not in self._links:
            number = self._tried[other]
            self.host.net.after(PAUSE_S * (number + 1), lambda: self._connect(other, number + 1))

    def _open(self, other: Address) -> None:
        if other in self._links:
            return
        link = self._links[other] = SimLink(self.host, "tcp", self.local, other)
        if self._runs:
            self._found(link)
        else:
            self._waiting.append(link)


class SimIce:
    """See the module. ``found`` is called once."""

    def __init__(self, host: SimHost, found: Callable[[SimLink], None], leads: bool) -> None:
        self.host, self.port, self._leads = host, host.port(), leads
        self.local: Address = (host.ip, self.port)
        self._found = found
        self._checked: set[Address] = set()
        self._early: list[Packet] | None = []  # checks that came before we knew the other's credentials
        self._chosen: Address | None = None
        self._link: SimLink | None = None
        self._over = False
        host.sockets["udp", self.port] = self._on_packet

    def gather(self, observer: Address, trip_s: float, ready: Callable[[tuple[Candidate, ...]], None]) -> None:
        """Call ``ready`` with our candidates when STUN has answered, or did not."""
        mapped = self.host.observed("udp", self.port, observer)
        found = [Candidate("host", "udp", self.host.ip, self.port)]
        if mapped and mapped != self.local:
            found.append(Candidate("srflx", "udp", *mapped))
        self.host.net.after(trip_s if mapped else UNANSWERED_S, lambda: None if self._over else ready(tuple(found)))

    def start(self, candidates: Sequence[Candidate]) -> None:
        """Check the other's candidates."""
        early, self._early = self._early or [], None
        for packet in early:
            self._on_packet(packet)
        for candidate in candidates:
            self._check((candidate.ip, candidate.port))

    def stop(self) -> None:
        """No more, unless there is a link."""
        self._over = True

    def _check(self, to: Address) -> None:
        if to not in self._checked:
            self._checked.add(to)
            for seconds in CHECKS_S:
                self.host.net.after(seconds, lambda: self._send_if_open("check", to))

    def _send_if_open(self, kind: str, to: Address) -> None:
        if not self._over and self._link is None:
            self._send(kind, to)

    def _send(self, kind: str, to: Address) -> None:
        self.host.send(Packet("udp", self.local, to, kind))

    def _on_packet(self, packet: Packet) -> None:
        other = packet.source
        if packet.kind == "data":
            if self._link is not None and other == self._link.remote:
                self._link.arrived(packet.body)
        elif self._over:
            return
        elif self._early is not None:
            self._early.append(packet)
        elif packet.kind == "check":
            self._send("answer", other)
            self._check(other)
        elif packet.kind == "answer" and self._leads and self._chosen is None:
            self._chosen = other
            for seconds in CHECKS_S:
                self.host.net.after(seconds, lambda: self._send_if_open("nominate", other))
        elif packet.kind == "nominate" and not self._leads:
            self._send("nominated", other)
            self._open(other)
        elif packet.kind == "nominated" and self._leads:
            self._open(other)

    def _open(self, other: Address) -> None:
        if self._link is None:
            link = self._link = SimLink(self.host, "udp", self.local, other)
            self.host.net.after(SECURED_S, lambda: None if self._over else self._found(link))
