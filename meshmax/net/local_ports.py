"""Who holds which port of this machine, and whether mDNS can open its socket. Blocking, briefly.

Only looks: a port is tried by binding it for a moment, the multicast group is joined and left. Not here: what it means.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

MDNS_PORT: Final = 5353
MDNS_GROUP: Final = "224.0.0.251"
ANOTHER: Final = "another program"

_TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES})


def port_holder(host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """The name of the program that holds a port, ``another program`` where it cannot be known, '' where it is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
        if kind == socket.SOCK_STREAM:  # as whoever listens does: what is only closing holds nothing
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            return _program_at(port) if error.errno in _TAKEN else ""
    return ""


def try_mdns(networks: Sequence[str]) -> str:
    """Why mDNS could not work on the interfaces with these IP addresses: a sentence, '' where it could."""
    reached = [ip for ip in networks if ":" not in ip]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("", MDNS_PORT))
            for ip in reached:
                membership = socket.inet_aton(MDNS_GROUP) + ipaddress.IPv4Address(ip).packed
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError as error:
        return f"UDP {MDNS_PORT}: {error.strerror or error}"
    return ""


def _program_at(port: int) -> str:
    import psutil

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and not connection.raddr and connection.pid:
                return psutil.Process(connection.pid).name()
    return ANOTHER
