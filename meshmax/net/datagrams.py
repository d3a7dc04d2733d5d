"""The UDP port of a node, shared by several protocols; satisfies ports.Datagrams.

Rules: one socket a bound address, all with the same port number where that is possible; the first byte of a datagram says
whose it is (RFC 7983), what is nobody's is dropped. Nothing that the network says ends a socket: errors that ICMP brings,
networks that are down and datagrams too large cost that one datagram. A socket whose address has left this machine is
bound again as soon as the address is back. Queues are the kernel's (KERNEL_BUFFER_BYTES), a full one drops, as UDP does.
Not here: what the datagrams mean, and how many of a stranger are answered (their protocols).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio

from meshmax.base.config import PORT_TRIES
from meshmax.base.errors import ConfigError
from meshmax.net.tcp import is_port_taken
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import DATAGRAMS

MAX_DATAGRAM_BYTES: Final = 8192  # longer ones are dropped both ways: nothing of ours needs more than a few packets
KERNEL_BUFFER_BYTES: Final = 1 << 20  # asked for in each direction: some hundred datagrams while we are busy elsewhere
BIND_AGAIN_S: Final = 2.0  # between two attempts to bind an address that has left; it may come back at any time
ERROR_PAUSE_S: Final = 0.05  # after an error of a socket that goes on, so that one that only fails costs little
MAX_ERRORS: Final = 20  # one after the other, before a socket is bound anew; ICMP brings one a datagram

OnDatagram = Callable[[bytes, tuple[str, int]], None]
Arrived = Callable[[bytes, tuple[str, int]], Awaitable[None]]

_log = get_logger("datagrams")
# sendto's words for "your address is no longer one of this machine" (Linux, macOS) and "your interface is gone".
_ADDRESS_LEFT: Final = frozenset({errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO})


class UdpDatagrams:
    """See the module. Made by `open_datagrams`."""

    def __init__(self, sockets: Sequence[_BoundSocket]) -> None:
        self._sockets = tuple(sockets)
        self._wanted: list[tuple[range, OnDatagram]] = []  # as many as there are protocols

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """See ports.Datagrams."""
        return tuple(bound.address for bound in self._sockets)

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        """See ports.Datagrams. An address that is no IP address, or of a family that is not bound, is unreachable."""
        target = _socket_address(*to)
        if target is None or not data or len(data) > MAX_DATAGRAM_BYTES:
            DATAGRAMS.labels(direction="out", outcome="refused").inc()
            return
        for bound in sorted(self._of_family(target), key=lambda bound: bound.distance(to[0])):
            if bound.send(data, target):
                DATAGRAMS.labels(direction="out", outcome="sent").inc()
                return
        DATAGRAMS.labels(direction="out", outcome="dropped").inc()

    def receive(self, first_bytes: range, on_datagram: OnDatagram) -> None:
        """See ports.Datagrams. Raises ValueError where somebody has one of ``first_bytes`` already."""
        if any(range(max(first_bytes.start, r.start), min(first_bytes.stop, r.stop)) for r, _ in self._wanted):
            raise ValueError(f"datagrams that begin with {first_bytes} have a receiver already")
        self._wanted.append((first_bytes, on_datagram))

    async def run(self) -> None:
        """Receive until cancelled."""
        async with trio.open_nursery() as nursery:
            for bound in self._sockets:
                nursery.start_soon(bound.run, self._arrived)

    async def _arrived(self, data: bytes, sender: tuple[str, int]) -> None:
        if data and len(data) <= MAX_DATAGRAM_BYTES:
            for first_bytes, on_datagram in self._wanted:
                if data[0] in first_bytes:
                    DATAGRAMS.labels(direction="in", outcome="taken").inc()
                    await isolate("datagram", partial(_call, on_datagram, data, sender))
                    return
        DATAGRAMS.labels(direction="in", outcome="dropped").inc()

    def _of_family(self, target: tuple[Any, ...]) -> list[_BoundSocket]:
        family = socket.AF_INET6 if len(target) == 4 else socket.AF_INET
        return [bound for bound in self._sockets if bound.family == family]


class _BoundSocket:
    """One bound address and, most of the time, its socket."""

    def __init__(self, host: str, sock: socket.socket) -> None:
        self._host, self._port = host, int(sock.getsockname()[1])
        self.family = sock.family
        self._sending: socket.socket | None = sock
        self._receiving = trio.socket.from_stdlib_socket(sock)  # of the same socket
        self._errors = 0

    @property
    def address(self) -> tuple[str, int]:
        """(ip, port) as it was asked for."""
        return self._host, self._port

    def distance(self, ip: str) -> tuple[bool, bool]:
        """Sorts the sockets that may reach ``ip``: of its kind (loopback or not) first, those bound to any address next."""
        return _is_loopback(ip) != _is_loopback(self._host), not _is_any(self._host)

    def send(self, data: bytes, target: tuple[Any, ...]) -> bool:
        """Whether the kernel took it. Never waits: the socket is non-blocking, an address in numbers is not looked up."""
        if self._sending is None:
            return False
        try:
            self._sending.sendto(data, target)
        except OSError as error:
            if error.errno in _ADDRESS_LEFT and not _is_any(self._host) and not _is_bindable(self._host):
                _log.info("the address has left this machine", host=self._host, port=self._port)
                self.close()
            return False
        return True

    async def run(self, arrived: Arrived) -> None:
        """Receive until cancelled."""
        while True:
            if self._sending is not None:
                await self._receive_one(arrived)
            elif not self._bind_again():
                await trio.sleep(BIND_AGAIN_S)

    async def _receive_one(self, arrived: Arrived) -> None:
        try:
            data, sender = await self._receiving.recvfrom(MAX_DATAGRAM_BYTES + 1)
        except trio.ClosedResourceError:
            await trio.lowlevel.checkpoint()  # `send` has closed it
        except OSError as error:
            self._errors += 1
            if self._errors >= MAX_ERRORS:
                _log.warning("the UDP socket goes on failing; bound anew", host=self._host, error=str(error))
                self._errors = 0
                self.close()
            await trio.sleep(ERROR_PAUSE_S)
        else:
            self._errors = 0
            await arrived(data, _sender(sender))

    def _bind_again(self) -> bool:
        try:
            sock = _bound_socket(self._host, self._port)
        except OSError:
            return False
        self._sending, self._receiving = sock, trio.socket.from_stdlib_socket(sock)
        _log.info("bound again", host=self._host, port=self._port)
        return True

    def close(self) -> None:
        """Close the socket; idempotent. `run` would open another."""
        self._receiving.close()
        self._sending = None


@asynccontextmanager
async def open_datagrams(listen: Sequence[tuple[str, int]]) -> AsyncIterator[UdpDatagrams]:
    """UDP sockets at each (host, port) of ``listen``; closed at the end of the block.

    A port that is taken on any of the hosts means the next free one for all (base.config.PORT_TRIES); port 0 any. A host of
    a family that this machine lacks is left out as long as one other works. Raises ConfigError when nothing can be bound.
    """
    numbers = [(ip, port) for host, port in listen for ip in await _numbers(host)]
    sockets = [_BoundSocket(host, sock) for host, sock in _bound_sockets(numbers)]
    try:
        datagrams = UdpDatagrams(sockets)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(datagrams.run)
            try:
                yield datagrams
            finally:
                nursery.cancel_scope.cancel()
    finally:
        for bound in sockets:
            bound.close()


async def _numbers(host: str) -> list[str]:
    """``host`` itself if it is an IP address, else what its name means here."""
    if _socket_address(host, 0) is not None:
        return [host]
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"'{host[:100]}' is no address of this machine: {error}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _bound_sockets(listen: Sequence[tuple[str, int]]) -> list[tuple[str, socket.socket]]:
    """A socket for each host that works; hosts with the same port number share the one that is found free."""
    by_port: dict[int, list[str]] = {}
    for host, port in listen:
        by_port.setdefault(port, []).append(host)
    bound: list[tuple[str, socket.socket]] = []
    failed: list[ConfigError] = []
    for port, hosts in by_port.items():
        try:
            bound += _bound_near(hosts, port)
        except ConfigError as error:
            failed.append(error)
    if not bound:
        raise failed[0] if failed else ConfigError("no address to receive datagrams at")
    for failure in failed:
        _log.warning("no datagrams there", error=failure.message)
    return bound


def _bound_near(hosts: Sequence[str], port: int) -> list[tuple[str, socket.socket]]:
    last: OSError | None = None
    for attempt in range(PORT_TRIES):
        candidate = port + attempt if port else 0
        if candidate > 65535:
            break
        try:
            return _bound_at(hosts, candidate)
        except OSError as error:
            last = error
            if not is_port_taken(error):
                break
    raise ConfigError(f"cannot bind UDP port {port} or the next {PORT_TRIES} on {' or '.join(hosts)}: {last}") from last


def _bound_at(hosts: Sequence[str], port: int) -> list[tuple[str, socket.socket]]:
    """All ``hosts`` at one port number. Raises OSError where it is taken on one of them, or where no host works."""
    bound: list[tuple[str, socket.socket]] = []
    last: OSError | None = None
    try:
        for host in hosts:
            try:
                bound.append((host, _bound_socket(host, port)))
            except OSError as error:
                if is_port_taken(error):
                    raise
                last = error  # this machine lacks the family, or the address
                continue
            port = port or int(bound[0][1].getsockname()[1])
    except OSError:
        for _, sock in bound:
            sock.close()
        raise
    if last is not None and not bound:
        raise last
    return bound


def _bound_socket(host: str, port: int) -> socket.socket:
    """A non-blocking UDP socket. Never with SO_REUSEADDR: a second node on our port must see that it is taken."""
    target = _socket_address(host, port)
    if target is None:
        raise OSError(errno.EADDRNOTAVAIL, f"{host} is no address of this machine")
    sock = socket.socket(socket.AF_INET6 if len(target) == 4 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, KERNEL_BUFFER_BYTES)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _socket_address(ip: str, port: int) -> tuple[Any, ...] | None:
    """What the socket module takes, without any look-up of names; None where it is no address, or its zone is not here."""
    address, _, zone = ip.partition("%")
    try:
        version = ipaddress.ip_address(address).version
        if not 0 <= port <= 65535:
            return None
        if version == 4:
            return None if zone else (address, port)
        return address, port, 0, (int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)) if zone else 0
    except (ValueError, OSError):
        return None


def _sender(address: tuple[Any, ...]) -> tuple[str, int]:
    """(ip, port) as ports.Datagrams has it; a link-local address with its zone, so that it can be answered."""
    ip, port = str(address[0]), int(address[1])
    if len(address) == 4 and address[3] and "%" not in ip:
        try:
            ip += "%" + socket.if_indextoname(address[3])
        except OSError:  # the interface went away just now
            ip += f"%{address[3]}"
    return ip, port


def _is_bindable(host: str) -> bool:
    try:
        _bound_socket(host, 0).close()
    except OSError:
        return False
    return True


def _is_loopback(ip: str) -> bool:
    return ipaddress.ip_address(ip.partition("%")[0]).is_loopback


def _is_any(ip: str) -> bool:
    return ipaddress.ip_address(ip.partition("%")[0]).is_unspecified


async def _call(on_datagram: OnDatagram, data: bytes, sender: tuple[str, int]) -> None:  # noqa: ASYNC124 -- what `isolate` takes
    on_datagram(data, sender)
