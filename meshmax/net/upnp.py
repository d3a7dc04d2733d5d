"""Port mappings by UPnP (IGD); satisfies ports.PortMapper.

A search goes to the LAN; of who answers within SEARCH_S, the first counts whose description names a connection that has an
external address. Whatever answers first is the router: its word counts for no more than what others see
(core.reachability). Answers are read up to a bound and for ANSWER_S, whoever sends them. Not here: what is said (wire.upnp),
what is asked for (core.port_mapping).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import urlsplit

import h11
import trio

from meshmax.base.errors import Busy, ConnectError, Refused, RemoteProtocolError
from meshmax.base.foreign import words_of
from meshmax.base.reachability import MappingProtocol
from meshmax.wire.upnp import (
    CONFLICT,
    GROUP,
    MAX_ANSWER_BYTES,
    MAX_DOCUMENT_BYTES,
    PERMANENT_ONLY,
    TARGETS,
    Fault,
    Service,
    action,
    answer_of,
    location_of,
    search,
    services_of,
)

SEARCH_S: Final = 3.0  # routers answer within a second (MX), and some are slow
SEARCH_AGAIN_S: Final = 0.5  # a datagram may be lost
ANSWER_S: Final = 5.0  # some home routers take seconds
MAX_ROUTERS: Final = 4  # that are asked of one search
READ_BYTES: Final = 8192
DESCRIPTION: Final = "meshmax"


class Upnp:
    """See the module. ``to``: where searches go."""

    name: Literal["upnp"] = "upnp"

    def __init__(self, to: tuple[str, int] = GROUP) -> None:
        self._to = to
        self._service: Service | None = None

    async def find(self) -> str:
        """See ports.PortMapper."""
        self._service = None
        found: dict[str, None] = {}
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)  # UDA, 1.3.2
            until_s = trio.current_time() + SEARCH_S
            while len(found) < MAX_ROUTERS and trio.current_time() < until_s:
                location = await self._search(sock, min(until_s, trio.current_time() + SEARCH_AGAIN_S))
                if location and location not in found:
                    found[location] = None
                    if (external_ip := await self._try_router(location)) is not None:
                        return external_ip
        raise ConnectError("no router here speaks UPnP", [(location, "upnp", "no use") for location in found])

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        """See ports.PortMapper."""
        service = self._found()
        arguments: dict[str, str | int] = {
            "NewRemoteHost": "",
            "NewExternalPort": external_port,
            "NewProtocol": protocol.upper(),
            "NewInternalPort": port,
            "NewInternalClient": await _own_address(service),
            "NewEnabled": 1,
            "NewPortMappingDescription": DESCRIPTION,
            "NewLeaseDuration": lifetime_s,
        }
        answer = await _act(service, "AddPortMapping", arguments)
        if isinstance(answer, Fault) and answer.code == PERMANENT_ONLY and lifetime_s:
            lifetime_s = 0
            answer = await _act(service, "AddPortMapping", {**arguments, "NewLeaseDuration": 0})
        _check(answer)
        return external_port, lifetime_s

    async def remove(self, protocol: MappingProtocol, port: int, external_port: int) -> None:
        """See ports.PortMapper; the router knows it by the external port."""
        del port
        arguments: dict[str, str | int] = {"NewRemoteHost": "", "NewExternalPort": external_port}
        arguments["NewProtocol"] = protocol.upper()
        _check(await _act(self._found(), "DeletePortMapping", arguments))

    def _found(self) -> Service:
        if self._service is None:
            raise ConnectError("no router was found by UPnP")
        return self._service

    async def _search(self, sock: trio.socket.SocketType, until_s: float) -> str:
        """Where a description is; '' if none came until then."""
        try:
            for target in TARGETS:
                await sock.sendto(search(target), self._to)
        except OSError as error:
            raise ConnectError("no router can be searched for by UPnP", [("", "upnp", str(error))]) from error
        location = ""
        with trio.CancelScope(deadline=until_s):
            while not location:
                data, source = await sock.recvfrom(MAX_ANSWER_BYTES + 1)
                try:
                    location = location_of(data, source[0])
                except RemoteProtocolError:
                    continue
        return location

    async def _try_router(self, location: str) -> str | None:
        """Its external address, if it has one; it is the router from then on."""
        try:
            for service in services_of(await _fetch("GET", location), location):
                answer = await _act(service, "GetExternalIPAddress", {})
                if not isinstance(answer, Fault):
                    ip = str(ipaddress.IPv4Address(answer.get("NewExternalIPAddress", "")))
                    self._service = service
                    return ip
        except (ConnectError, RemoteProtocolError, ValueError):
            return None
        return None


def _check(answer: dict[str, str] | Fault) -> None:
    if isinstance(answer, Fault):
        if answer.code == CONFLICT:
            raise Busy("the port is mapped to another machine")
        raise Refused(f"the router refuses: {answer.text[:100] or 'error'} ({answer.code})")


async def _act(service: Service, name: str, arguments: Mapping[str, str | int]) -> dict[str, str] | Fault:
    headers, body = action(service, name, arguments)
    try:
        return answer_of(await _fetch("POST", service.url, headers, body), name)
    except RemoteProtocolError as error:
        raise ConnectError("the router does not speak UPnP", [(service.url, "upnp", error.message)]) from error


async def _fetch(method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
    """What is at ``url``, whatever its status: faults come with 500. Raises ConnectError."""
    at = urlsplit(url)
    fields = {"Host": at.netloc, "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    target = f"{at.path or '/'}?{at.query}" if at.query else at.path or "/"
    document, reason = None, f"no answer in {ANSWER_S:.0f} s"
    with trio.move_on_after(ANSWER_S):
        try:
            async with await trio.open_tcp_stream(at.hostname or "", at.port or 80) as stream:
                request = h11.Request(method=method, target=target, headers=list(fields.items()))
                document = await _exchange(stream, request, body)
        except (h11.ProtocolError, OSError, trio.BrokenResourceError) as error:
            reason = words_of(error)
    if document is None:
        raise ConnectError("the router does not answer", [(url, "upnp", reason)])
    return document


async def _exchange(stream: trio.SocketStream, request: h11.Request, body: bytes) -> bytes:
    """The body of the answer. Raises ConnectError: it is too long."""
    http, document = h11.Connection(h11.CLIENT), bytearray()
    for part in (request, h11.Data(data=body), h11.EndOfMessage()):
        await stream.send_all(http.send(part) or b"")
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(READ_BYTES))
        elif isinstance(event, h11.Data):
            document += event.data
            if len(document) > MAX_DOCUMENT_BYTES:
                raise ConnectError("the router says too much")
        elif not isinstance(event, (h11.InformationalResponse, h11.Response)):  # its end
            return bytes(document)


async def _own_address(service: Service) -> str:
    """Our address towards the router."""
    url = urlsplit(service.url)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            await sock.connect((url.hostname, url.port or 80))
        except OSError as error:
            raise ConnectError("the router cannot be reached", [(service.url, "upnp", str(error))]) from error
        return str(sock.getsockname()[0])
