"""Simultaneous open of TCP connections (RFC 5382, 4.2; RFC 9293, 3.5) through NATs; satisfies ports.Puncher.

Rules: an attempt has a local port of its own, shared by all its sockets (SO_REUSEADDR and SO_REUSEPORT): a connection to an
observer, kept open, so that the NAT keeps the mapping that the observer told; a listening one per family, so that an early
SYN of the peer finds somebody; and one connecting socket per target, given up and made anew after RETRY_S and then later and
later, since the kernel would repeat a SYN that a NAT dropped only after a second. At most MAX_TARGETS are connected to, mapped
addresses first; never loopback, unspecified, multicast, link-local or broadcast addresses, and never our own, as a port that
connects to itself succeeds. Whoever comes is handed on, since a NAT may show a peer under another port or address than
the one told, but of those whose address is no target's at most MAX_STRANGERS. Nothing here proves who somebody is; nobody
gets a byte before the reader of ``found`` speaks. Not here: which targets are believed (core.candidates), when (core.signalling).
"""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import trio

from meshmax.base.errors import ConnectError, RemoteProtocolError
from meshmax.base.traversal import PUNCH_TCP_S, Candidate
from meshmax.net.interfaces import is_zoned, running_interfaces
from meshmax.net.observer import receive_message
from meshmax.net.tcp import TcpBytes, is_port_taken
from meshmax.ports import ByteStream
from meshmax.wire import stun

MAX_TARGETS: Final = 4  # connected to at once: a mapped address and a few of the peer's interfaces
MAX_STRANGERS: Final = 4  # accepted from addresses that are no target's; each costs the reader one proof
MAX_OBSERVERS: Final = 3  # asked of one family; each has the time that is left
MAX_HOSTS: Final = 8  # addresses of our own that are told
READY_S: Final = 1.0  # for the observers, from the port's birth; two round trips to the farthest place are 0.6 s
NEXT_OBSERVER_S: Final = 0.2  # the head start of an observer over the next
OTHER_FAMILY_S: Final = 0.1  # once one family's observer has answered
RETRY_S: Final = 0.3  # for the first SYN and its answer; the next has RETRY_MORE_S more each time
RETRY_MORE_S: Final = 0.2
PAUSE_S: Final = 0.05  # after an error that came at once, times the number of tries
TRIES: Final = 6  # per target
BACKLOG: Final = 8  # of the listening sockets
PORT_TRIES: Final = 3  # until a port is free for both families

_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


class TcpPunchPort:
    """See ports.PunchPort. Made by `TcpPuncher.open_port`."""

    def __init__(self, port: int, listeners: Sequence[trio.socket.SocketType], loopback: bool) -> None:
        self.port = port
        self.candidates: tuple[Candidate, ...] = ()
        self._listeners = tuple(listeners)
        self._loopback = loopback

    async def run(self, targets: Sequence[Candidate], found: trio.MemorySendChannel[ByteStream]) -> None:
        """See ports.PunchPort."""
        chosen = choose_targets(targets, self.candidates, loopback=self._loopback)
        known = {target.ip for target in chosen}
        with trio.move_on_after(PUNCH_TCP_S):
            async with trio.open_nursery() as nursery:
                door = _Door(found, known, nursery.cancel_scope)
                for listener in self._listeners:
                    nursery.start_soon(door.accept, listener)
                for target in chosen:
                    nursery.start_soon(self._connect, target, door)

    async def _connect(self, target: Candidate, door: _Door) -> None:
        for number in range(TRIES):
            stream: TcpBytes | None = None
            try:
                with trio.move_on_after(RETRY_S + RETRY_MORE_S * number):
                    stream = await self._dial(target)
                if stream is not None:
                    await door.hand_on(stream)
                    return
            except OSError:
                # Refused (a host without our listener yet, a router that answers), or the peer's own SYN came first and
                # the listener has the connection (EADDRNOTAVAIL): either may be otherwise in a moment.
                await trio.sleep(PAUSE_S * (number + 1))

    async def _dial(self, target: Candidate) -> TcpBytes:
        sock = await _bound(_family_of(target.ip), self.port)
        try:
            await sock.connect((target.ip, target.port))
            return TcpBytes(trio.SocketStream(sock))
        except BaseException:
            sock.close()
            raise

    async def learn(self, observers: Sequence[tuple[str, int]], stack: AsyncExitStack) -> None:
        """Ask the observers and tell the candidates. The connections that count are closed with ``stack``."""
        mapped: dict[socket.AddressFamily, Candidate] = {}
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + READY_S
            families = [family for family in _FAMILIES if any(_family_of(ip) is family for ip, _ in observers)]

            async def learn_family(family: socket.AddressFamily) -> None:
                asked = [(ip, port) for ip, port in observers if _family_of(ip) is family][:MAX_OBSERVERS]
                answer = await self._first_answer(asked, stack)
                if answer is None:
                    return
                mapped[family] = Candidate("srflx", "tcp", *answer)
                late = trio.current_time() + OTHER_FAMILY_S
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, late)

            for family in families:
                nursery.start_soon(learn_family, family)
        hosts = [Candidate("host", "tcp", ip, self.port) for ip in self._own_addresses()]
        seen = [candidate for candidate in mapped.values() if (candidate.ip, candidate.port) not in _places(hosts)]
        self.candidates = (*hosts, *seen)

    async def _first_answer(
        self, observers: Sequence[tuple[str, int]], stack: AsyncExitStack
    ) -> tuple[str, int] | None:
        first: list[tuple[str, int]] = []
        async with trio.open_nursery() as nursery:
            failed = [trio.Event() for _ in observers]

            async def ask(observer: tuple[str, int], done: trio.Event) -> None:
                try:
                    stream = await self._dial(Candidate("host", "tcp", *observer))
                except OSError:
                    done.set()
                    return
                try:
                    mapped = await _mapped_address(stream)
                except BaseException:
                    stream.close()
                    raise
                if mapped is None or first:
                    stream.close()
                    done.set()
                    return
                stack.callback(stream.close)
                first.append(mapped)
                nursery.cancel_scope.cancel()

            for observer, done in zip(observers, failed, strict=True):
                nursery.start_soon(ask, observer, done)
                with trio.move_on_after(NEXT_OBSERVER_S):
                    await done.wait()
        return first[0] if first else None

    def _own_addresses(self) -> list[str]:
        families = {listener.family for listener in self._listeners}
        try:
            interfaces = running_interfaces()
        except OSError:
            return []
        ips = [ip for interface in interfaces for ip in interface.ips if not is_zoned(ip)]
        told = [ip for ip in ips if self._loopback or not ipaddress.ip_address(ip).is_loopback]
        return [ip for ip in dict.fromkeys(told) if _family_of(ip) in families][:MAX_HOSTS]


class _Door:
    """Hands connections on to ``found`` for one run; ends the run when nobody reads there any more."""

    def __init__(self, found: trio.MemorySendChannel[ByteStream], known: set[str], scope: trio.CancelScope) -> None:
        self._found, self._known, self._scope = found, known, scope
        self._strangers = 0

    async def accept(self, listener: trio.socket.SocketType) -> None:
        while True:
            try:
                connected, _ = await listener.accept()
            except OSError:
                await trio.sleep(PAUSE_S)  # gone before it was accepted, or no descriptor is left
                continue
            try:
                stream = TcpBytes(trio.SocketStream(connected))
            except OSError:  # gone before we looked
                connected.close()
                continue
            if stream.remote[0] not in self._known:
                self._strangers += 1
                if self._strangers > MAX_STRANGERS:
                    stream.close()
                    continue
            await self.hand_on(stream)

    async def hand_on(self, stream: TcpBytes) -> None:
        try:
            await self._found.send(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            stream.close()
            self._scope.cancel()
        except BaseException:
            stream.close()
            raise


class TcpPuncher:
    """See ports.Puncher. ``loopback``: also tell and connect to loopback addresses, as tests do."""

    def __init__(self, *, loopback: bool = False) -> None:
        self._loopback = loopback

    @asynccontextmanager
    async def open_port(self, observers: Sequence[tuple[str, int]]) -> AsyncIterator[TcpPunchPort]:
        """See ports.Puncher."""
        async with AsyncExitStack() as stack:
            try:
                port, listeners = await _listeners()
            except OSError as error:
                raise ConnectError(f"no local port for a simultaneous open: {error.strerror or error}") from error
            for listener in listeners:
                stack.callback(listener.close)
            opened = TcpPunchPort(port, listeners, self._loopback)
            await opened.learn(observers, stack)
            yield opened


def choose_targets(
    targets: Sequence[Candidate], own: Sequence[Candidate] = (), *, loopback: bool = False
) -> list[Candidate]:
    """Those of ``targets`` that may be connected to, at most MAX_TARGETS, mapped addresses first."""
    ours = _places(own)
    good: dict[tuple[str, int], Candidate] = {}
    for each in sorted(targets, key=lambda target: target.kind == "host"):
        if (each.ip, each.port) not in ours and _may_connect(each, loopback):
            good.setdefault((each.ip, each.port), each)
    return list(good.values())[:MAX_TARGETS]


def _may_connect(target: Candidate, loopback: bool) -> bool:
    try:
        ip = ipaddress.ip_address(target.ip)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.scope_id):
        return False
    if target.transport != "tcp" or not 0 < target.port <= 65535:
        return False
    if ip.is_loopback:
        return loopback
    return not (ip.is_unspecified or ip.is_multicast or ip.is_link_local or ip == _BROADCAST)


def _places(candidates: Sequence[Candidate]) -> set[tuple[str, int]]:
    return {(each.ip, each.port) for each in candidates}


def _family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


async def _bound(family: socket.AddressFamily, port: int) -> trio.socket.SocketType:
    """A socket at ``port`` of every address of a family, beside others of ours. Raises OSError."""
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):  # not on Windows, where SO_REUSEADDR means both
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _avoid_bbr(sock)
        await sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104 -- peers are outside
    except BaseException:
        sock.close()
        raise
    return sock


def _avoid_bbr(sock: trio.socket.SocketType) -> None:
    """Use a congestion control that counts losses, where the system's is BBR: two SYNs that cross look like an answer after half
    a round trip, and BBR keeps its window to that, a fifth of the path's rate, until it measures anew after ten seconds."""
    option = getattr(socket, "TCP_CONGESTION", None)  # Linux
    if option is None or not sock.getsockopt(socket.IPPROTO_TCP, option, 16).startswith(b"bbr"):
        return
    for name in (b"cubic", b"reno"):  # the first one may not be allowed to everybody, the second one is
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, name)
            return


async def _listening(family: socket.AddressFamily, port: int) -> trio.socket.SocketType:
    sock = await _bound(family, port)
    try:
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _listeners() -> tuple[int, list[trio.socket.SocketType]]:
    """A port that nobody has, and a listening socket on it for each family that this machine has. Raises OSError."""
    for left in reversed(range(PORT_TRIES)):
        try:
            first = await _listening(socket.AF_INET, 0)
        except OSError as error:
            if not _no_such_family(error):
                raise
            only = await _listening(socket.AF_INET6, 0)
            return int(only.getsockname()[1]), [only]
        port = int(first.getsockname()[1])
        try:
            return port, [first, await _listening(socket.AF_INET6, port)]
        except OSError as error:
            if not left or not is_port_taken(error):
                return port, [first]
            first.close()
        except BaseException:
            first.close()
            raise
    raise AssertionError("the last try returns")


def _no_such_family(error: OSError) -> bool:
    return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


async def _mapped_address(stream: ByteStream) -> tuple[str, int] | None:
    """Where the observer sees this connection come from, or None where it does not say."""
    transaction = secrets.token_bytes(stun.TRANSACTION_BYTES)
    with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
        await stream.send_all(stun.encode_request(transaction))
        return stun.parse_answer(await receive_message(stream), transaction).mapped
    return None
