"""The door: accepts connections, within bounds, until each is authenticated or turned away.

Rules: who may not connect is turned away before a byte is read. At most MAX_HALF_OPEN connections are in the handshake,
MAX_HALF_OPEN_PER_IP from one address, each for HANDSHAKE_TIMEOUT_S; where there is no room the oldest of the crowd makes
way (it had its time, an honest handshake needs milliseconds) and accepting slows to one in ACCEPT_PACE_S, so that a flood
costs neither memory nor the processor and honest peers still get in. Not here: the handshake itself (swarm).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from meshmax.base.config import PORT_TRIES
from meshmax.base.errors import ConfigError
from meshmax.net import limits
from meshmax.net.tcp import is_port_taken
from meshmax.net.wire import Listener, Transport
from meshmax.ports import ByteStream
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

_log = get_logger("door")
_RETRY_ACCEPT_S = 0.1  # pause after accept failed, as when the process has no file descriptor left


class Door:
    """Accepts on any number of listeners; ``handshake`` owns a connection from the first byte to the last of its own."""

    def __init__(
        self, nursery: trio.Nursery, allow: Callable[[str], bool], handshake: Callable[[ByteStream], Awaitable[None]]
    ) -> None:
        self._nursery, self._allow, self._handshake = nursery, allow, handshake
        self._half_open: dict[trio.CancelScope, str] = {}  # oldest first
        self._per_ip: Counter[str] = Counter()

    def open(self, listener: Listener) -> None:
        """Accept on ``listener`` until cancelled."""
        self._nursery.start_soon(self._accept, listener)

    @property
    def half_open(self) -> int:
        """Connections in the handshake now."""
        return len(self._half_open)

    async def _accept(self, listener: Listener) -> None:
        try:
            while True:
                try:
                    stream = await listener.accept()
                except trio.ClosedResourceError:
                    return  # the swarm has closed the listener
                except OSError as error:
                    _log.warning("cannot accept connections for the moment", error=str(error))
                    await trio.sleep(_RETRY_ACCEPT_S)
                    continue
                if self._admit(stream):
                    await trio.sleep(limits.ACCEPT_PACE_S)
        finally:
            listener.close()

    def _admit(self, stream: ByteStream) -> bool:
        """Start the handshake unless the address is not allowed; whether somebody had to make way."""
        ip = stream.remote[0]
        if not self._allow(ip):
            stream.close()
            return False
        crowded = self._make_room(ip)
        scope = trio.CancelScope(deadline=trio.current_time() + limits.HANDSHAKE_TIMEOUT_S)
        self._half_open[scope] = ip
        self._per_ip[ip] += 1
        self._nursery.start_soon(self._attend, scope, ip, stream)
        return crowded

    def _make_room(self, ip: str) -> bool:
        if self._per_ip[ip] >= limits.MAX_HALF_OPEN_PER_IP:
            oldest = next(scope for scope, of_ip in self._half_open.items() if of_ip == ip)
        elif len(self._half_open) >= limits.MAX_HALF_OPEN:
            crowd = max(self._per_ip, key=lambda of_ip: self._per_ip[of_ip])
            oldest = next(scope for scope, of_ip in self._half_open.items() if of_ip == crowd)
        else:
            return False
        self._forget(oldest)
        oldest.cancel()
        return True

    def _forget(self, scope: trio.CancelScope) -> None:
        ip = self._half_open.pop(scope, None)
        if ip is not None:
            self._per_ip[ip] -= 1
            if not self._per_ip[ip]:
                del self._per_ip[ip]

    async def _attend(self, scope: trio.CancelScope, ip: str, stream: ByteStream) -> None:
        try:
            with scope:
                await isolate("handshake", partial(self._handshake, stream), remote=ip)
        finally:
            self._forget(scope)


async def listen_near(transport: Transport, host: str, port: int) -> Listener:
    """Listen on ``port`` or, where it is taken, the next free one within PORT_TRIES. Raises ConfigError."""
    last: OSError | None = None
    for candidate in range(port, min(port + PORT_TRIES, 65536)) if port else (0,):
        try:
            return await transport.listen(host, candidate)
        except OSError as error:
            last = error
            if not is_port_taken(error):
                break
    raise ConfigError(f"cannot listen on {host} port {port} or the next {PORT_TRIES}: {last}") from last
