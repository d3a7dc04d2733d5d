"""A TURN server (RFC 8656) for tests: long-term credentials, UDP allocations, channels; clients by UDP or TCP."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from aioice import stun
from aioice.turn import make_integrity_key

USER, PASSWORD, REALM = "someone", "secret", "lab"

Send = Callable[[bytes], Awaitable[Any]]


class TurnServer:
    """Made by `open_turn_server`; ``port`` is UDP and TCP. ``allocations`` now; ``asked`` in all."""

    def __init__(self, ip: str, port: int, nursery: trio.Nursery) -> None:
        self.ip, self.port = ip, port
        self.allocations = 0
        self.asked = 0
        self.by_tcp = 0
        self.clients: list[_Client] = []
        self._nursery = nursery

    async def serve_udp(self, sock: trio.socket.SocketType) -> None:
        clients: dict[Any, _Client] = {}
        while True:
            data, whom = await sock.recvfrom(4096)

            async def send(answer: bytes, whom: Any = whom) -> None:
                await sock.sendto(answer, whom)

            if whom not in clients:
                clients[whom] = _Client(self, whom, send)
            await clients[whom].take(data)

    async def serve_tcp(self, stream: trio.SocketStream) -> None:
        self.by_tcp += 1
        client = _Client(self, stream.socket.getpeername(), stream.send_all)
        buffer = b""
        try:
            async for some in stream:
                buffer += some
                while len(buffer) >= 4:
                    length = struct.unpack("!H", buffer[2:4])[0]
                    whole = (4 if buffer[0] & 0xC0 == 0x40 else 20) + length + -length % 4
                    if len(buffer) < whole:
                        break
                    await client.take(buffer[:whole])
                    buffer = buffer[whole:]
        except trio.BrokenResourceError:
            pass
        finally:
            client.end()


class _Client:
    def __init__(self, server: TurnServer, address: Any, send: Send) -> None:
        self._server, self._address, self._send = server, address, send
        self._relay: trio.socket.SocketType | None = None
        self._channels: dict[int, tuple[str, int]] = {}
        server.clients.append(self)

    def end(self) -> None:
        if self._relay is not None:
            self._server.allocations -= 1
            self._relay.close()
            self._relay = None

    async def take(self, data: bytes) -> None:
        if data[0] & 0xC0 == 0x40:
            number, length = struct.unpack("!HH", data[:4])
            if self._relay is not None and number in self._channels:
                await self._relay.sendto(data[4 : 4 + length], self._channels[number])
            return
        request = stun.parse_message(data)
        key = make_integrity_key(USER, REALM, PASSWORD)
        if not request.check_message_integrity(key):
            await self._answer(request, {"ERROR-CODE": (401, "Unauthorized"), "NONCE": b"once", "REALM": REALM}, b"")
            return
        answer: dict[str, Any] = {}
        if request.message_method == stun.Method.ALLOCATE:
            answer = await self._allocate()
        elif request.message_method == stun.Method.REFRESH:
            answer = {"LIFETIME": request.attributes["LIFETIME"]}
            if not request.attributes["LIFETIME"]:
                self.end()
        elif request.message_method == stun.Method.CHANNEL_BIND:
            self._channels[request.attributes["CHANNEL-NUMBER"]] = request.attributes["XOR-PEER-ADDRESS"]
        await self._answer(request, answer, key)

    async def _allocate(self) -> dict[str, Any]:
        self._relay = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        await self._relay.bind((self._server.ip, 0))
        self._server.allocations += 1
        self._server.asked += 1
        self._server._nursery.start_soon(self._carry, self._relay)
        relayed = self._relay.getsockname()
        return {"LIFETIME": 600, "XOR-MAPPED-ADDRESS": self._address, "XOR-RELAYED-ADDRESS": relayed}

    async def _answer(self, request: stun.Message, attributes: dict[str, Any], key: bytes) -> None:
        kind = stun.Class.ERROR if "ERROR-CODE" in attributes else stun.Class.RESPONSE
        answer = stun.Message(request.message_method, kind, request.transaction_id)
        answer.attributes.update(attributes)
        if key:
            answer.add_message_integrity(key)
        await self._send(bytes(answer))

    async def _carry(self, relay: trio.socket.SocketType) -> None:
        with suppress(OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            while True:
                data, whom = await relay.recvfrom(4096)
                number = next((number for number, peer in self._channels.items() if peer == whom), None)
                if number is not None:
                    await self._send(struct.pack("!HH", number, len(data)) + data + bytes(-len(data) % 4))


@asynccontextmanager
async def open_turn_server(ip: str) -> AsyncIterator[TurnServer]:
    """A server at that address, at any port."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((ip, 0))
        port = sock.getsockname()[1]
        listeners = await trio.open_tcp_listeners(port, host=ip)
        async with trio.open_nursery() as nursery:
            server = TurnServer(ip, port, nursery)
            nursery.start_soon(server.serve_udp, sock)  # noqa: ASYNC113  the kernel keeps what comes before it runs
            nursery.start_soon(trio.serve_listeners, server.serve_tcp, listeners)  # noqa: ASYNC113  likewise
            try:
                yield server
            finally:
                nursery.cancel_scope.cancel()
                for client in server.clients:
                    client.end()
