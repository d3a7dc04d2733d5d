"""What is said to an Internet Gateway Device (UPnP IGD:1 and 2): search, description, actions and their answers, as bytes.

Whoever is on the LAN may answer a search, so: a description is fetched only from the very host that answered, actions go to that
host alone; documents have at most MAX_DOCUMENT_BYTES and no DOCTYPE, so no entities of their own. Not here: sockets (net.upnp).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urljoin, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.units import KIB

GROUP: Final = ("239.255.255.250", 1900)
TARGETS: Final = tuple(
    f"urn:schemas-upnp-org:{what}"
    for what in ("device:InternetGatewayDevice:1", "device:InternetGatewayDevice:2", "service:WANIPConnection:1")
)
MAX_ANSWER_BYTES: Final = 2048  # of a search; it is one datagram with a few headers
MAX_DOCUMENT_BYTES: Final = 64 * KIB  # descriptions of real routers have 2 to 20 KiB
MAX_URL: Final = 512
MAX_SERVICES: Final = 8  # connections of one router
MAX_TEXT: Final = 200  # of an answer's values
CONFLICT: Final = 718  # another machine has that port (IGD, WANIPConnection, 2.4.16)
PERMANENT_ONLY: Final = 725  # no lifetimes are supported

_LOCATION: Final = re.compile(rb"^location:[ \t]*(\S{1,512})[ \t]*$", re.IGNORECASE | re.MULTILINE)
_TYPE: Final = re.compile(r"urn:schemas-upnp-org:service:WAN(?:IP|PPP)Connection:[0-9]{1,2}")
_ENVELOPE: Final = (
    '<?xml version="1.0"?>\r\n<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
    's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body><u:{action} xmlns:u="{type}">{arguments}'
    "</u:{action}></s:Body></s:Envelope>\r\n"
)


class Service(msgspec.Struct, frozen=True):
    """A connection of a router that maps ports. ``url``: where its actions go."""

    type: str
    url: str


class Fault(msgspec.Struct, frozen=True):
    """The router says no. ``code``: of UPnP (UDA, 3.2.2); ``text``: its own words, cut."""

    code: int
    text: str


def search(target: str) -> bytes:
    """The question for devices of that kind, sent to GROUP; they answer within a second."""
    host = f"{GROUP[0]}:{GROUP[1]}"
    return f'M-SEARCH * HTTP/1.1\r\nHOST: {host}\r\nST: {target}\r\nMAN: "ssdp:discover"\r\nMX: 1\r\n\r\n'.encode()


def location_of(answer: bytes, source: str) -> str:
    """Where the description is of who answered from ``source``. Raises RemoteProtocolError."""
    match = _LOCATION.search(answer.replace(b"\r\n", b"\n")) if len(answer) <= MAX_ANSWER_BYTES else None
    if not answer.startswith(b"HTTP/1.") or b" 200" not in answer[:16] or match is None:
        raise RemoteProtocolError("this is no answer to a search")
    return _url_at(match[1].decode(errors="replace"), source)


def services_of(description: bytes, location: str) -> tuple[Service, ...]:
    """What maps ports there. Raises RemoteProtocolError."""
    root, host = _parsed(description), urlsplit(location).hostname or ""
    base = next((text for tag, text in _texts(root) if tag == "URLBase" and text), location)
    found = []
    for element in root.iter():
        if _name(element) != "service":
            continue
        told = dict(_texts(element))
        kind, control = told.get("serviceType", ""), told.get("controlURL", "")
        if _TYPE.fullmatch(kind) and control and len(control) <= MAX_URL:
            found.append(Service(kind, _url_at(urljoin(base, control), host)))
    return tuple(found[:MAX_SERVICES])


def action(service: Service, name: str, arguments: Mapping[str, str | int]) -> tuple[dict[str, str], bytes]:
    """Headers and body of a POST to the service."""
    inner = "".join(f"<{key}>{escape(str(value))}</{key}>" for key, value in arguments.items())
    body = _ENVELOPE.format(action=name, type=service.type, arguments=inner).encode()
    return {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{service.type}#{name}"'}, body


def answer_of(document: bytes, name: str) -> dict[str, str] | Fault:
    """What an action gave. Raises RemoteProtocolError."""
    root = _parsed(document)
    for element in root.iter():
        if _name(element) == f"{name}Response":
            return dict(_texts(element))
        if _name(element) == "UPnPError":
            told = dict(_texts(element))
            code = told.get("errorCode", "")
            printable = "".join(letter for letter in told.get("errorDescription", "") if letter.isprintable())
            return Fault(int(code) if code.isascii() and code.isdecimal() else 0, printable)
    raise RemoteProtocolError("this is no answer to an action")


def _parsed(document: bytes) -> ElementTree.Element:
    if len(document) > MAX_DOCUMENT_BYTES or b"<!DOCTYPE" in document or b"<!ENTITY" in document:
        raise RemoteProtocolError("this is no description of a router")
    if document[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in document:  # in which a DOCTYPE looks otherwise
        raise RemoteProtocolError("this is no description of a router")
    try:
        return ElementTree.fromstring(document)  # noqa: S314 - without entities, and short
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise RemoteProtocolError("this is no description of a router") from error


def _texts(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for child in element:
        yield _name(child), (child.text or "").strip()[:MAX_URL]


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _url_at(text: str, host: str) -> str:
    """``text`` if it is of http at ``host``, which is an IP address."""
    try:
        url = urlsplit(text)
        good = url.scheme == "http" and ipaddress.ip_address(url.hostname or "") == ipaddress.ip_address(host)
        _ = url.port  # it may be out of range
    except ValueError:
        good = False
    if not good or len(text) > MAX_URL or not text.isascii() or not text.isprintable():
        raise RemoteProtocolError("a router that tells of other hosts is none")
    return text
