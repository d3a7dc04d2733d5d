"""TCP as a Transport. Not here: who may connect (door), what an address is worth (addresses)."""

from __future__ import annotations

import errno
import socket

import trio

from meshmax.net import limits
from meshmax.net.addresses import interface_addresses


class TcpBytes:
    """A connected socket; satisfies wire.ByteStream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        host, port = stream.socket.getpeername()[:2]
        self.remote = (str(host), int(port))

    async def send_all(self, data: bytes) -> None:
        """See wire.ByteStream."""
        await self._stream.send_all(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        """See wire.ByteStream."""
        return bytes(await self._stream.receive_some(max_bytes))

    def close(self) -> None:
        """See wire.ByteStream."""
        self._stream.socket.close()

    def detach(self) -> socket.socket:
        """Hand the socket over; this object is closed from then on. Nobody may be sending or receiving."""
        ours = self._stream.socket
        return socket.socket(ours.family, ours.type, ours.proto, fileno=ours.detach())


class TcpListener:
    """A listening socket; satisfies wire.Listener."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        host, port = sock.getsockname()[:2]
        self.local = (str(host), int(port))

    async def accept(self) -> TcpBytes:
        """See wire.Listener."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        connected, _ = await self._socket.accept()
        try:
            return TcpBytes(trio.SocketStream(connected))
        except OSError:  # gone before we looked: getpeername fails
            connected.close()
            raise

    def close(self) -> None:
        """See wire.Listener."""
        self._socket.close()


class TcpTransport:
    """TCP over IPv4 and IPv6; satisfies wire.Transport."""

    async def resolve(self, host: str) -> list[str]:
        """See wire.Transport."""
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def connect(self, ip: str, port: int) -> TcpBytes:
        """See wire.Transport."""
        return TcpBytes(await trio.open_tcp_stream(ip, port))

    async def listen(self, host: str, port: int) -> TcpListener:
        """See wire.Transport. Never with SO_REUSEPORT: a second node on our port must see that it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await sock.bind((host, port))
            sock.listen(limits.LISTEN_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return TcpListener(sock)

    def interface_addresses(self) -> list[str]:
        """See wire.Transport."""
        return interface_addresses()


def is_port_taken(error: OSError) -> bool:
    """Whether the next port may be free where this one was not."""
    return error.errno == errno.EADDRINUSE
