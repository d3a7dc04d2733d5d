"""Dialling: every address at once, each with its own deadline; the first that proves the PeerId wins, the rest is dropped.

Rules: at most MAX_DIAL_ADDRESSES addresses of one peer and MAX_DIALS attempts at once; an address that may not be used, or
that names another peer, is an attempt that failed; so is a name that leads to loopback, unless it says so. Two dials to one
peer do not race each other: the second waits for the first, which is over when its ``finish`` (the admission) is. A peer that
failed before is tried like any other. Addresses over relays are passed over. Not here: who should be dialled, and when again
(services); relays (services.relay_client).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

import trio

from meshmax.base.errors import ConnectError, InvalidRequest, MeshmaxError
from meshmax.base.foreign import words_of
from meshmax.base.ids import PeerId
from meshmax.core.candidates import leads_here
from meshmax.net import library, limits
from meshmax.net.addresses import Endpoint, is_circuit, parse_endpoint, without_own_loopback
from meshmax.net.wire import Transport
from meshmax.ports import ByteStream

Attempt = tuple[str, str, str]  # address, stage, cause


class _Cuttable(Protocol):
    def cut(self) -> None: ...


L = TypeVar("L", bound=_Cuttable)


class Dialler(Generic[L]):
    """Makes connections; ``secure`` takes a byte stream to the point where the peer has proved who it is."""

    def __init__(
        self,
        transport: Transport,
        allow: Callable[[str], bool],
        secure: Callable[[ByteStream, PeerId], Awaitable[L]],
    ) -> None:
        self._transport, self._allow, self._secure = transport, allow, secure
        self._dialling: dict[PeerId, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(limits.MAX_DIALS)

    async def dial(
        self,
        peer_id: PeerId,
        addresses: Sequence[str],
        connected: Callable[[], bool],
        finish: Callable[[L], Awaitable[None]],
        delays_s: Sequence[float] = (),
    ) -> None:
        """Connect to ``peer_id``. Raises ConnectError with every attempt, unless ``connected`` says that it came to us.

        ``delays_s`` as in ports.Swarm. ``finish`` takes over the connection that won, and what it raises comes out.
        """
        while peer_id in self._dialling and not connected():
            await self._dialling[peer_id].wait()
        if connected():
            return
        ended = self._dialling[peer_id] = trio.Event()
        try:
            won = await self._race(peer_id, addresses, delays_s)
            if not isinstance(won, list):
                await finish(won)
            elif not connected():
                raise ConnectError("No connection to the peer could be made.", won)
        finally:
            del self._dialling[peer_id]
            ended.set()

    async def prove(self, peer_id: PeerId, address: str) -> None:
        """Connect to ``address`` whatever connections there are, and hang up. Raises ConnectError: it is not the peer's."""
        made: list[L] = []
        try:
            failure = await self._try(peer_id, address, made)
        finally:
            for link in made:
                link.cut()
        if failure is not None:
            raise ConnectError("The peer is not there.", [(address[:200], *failure)])

    async def _race(self, peer_id: PeerId, addresses: Sequence[str], delays_s: Sequence[float]) -> L | list[Attempt]:
        """The connection of the address that won, else why each lost."""
        dialable = [address for address in addresses if not is_circuit(address)]
        chosen = without_own_loopback(dialable, self._transport.interface_addresses)[: limits.MAX_DIAL_ADDRESSES]
        if not chosen:
            only = (
                "only addresses of the peer over relays are known" if addresses else "no address of the peer is known"
            )
            raise ConnectError(only)
        attempts: list[Attempt] = []
        made: list[L] = []

        delays = dict(reversed(tuple(zip(addresses, delays_s, strict=False))))
        began, under_way, idle = trio.current_time(), 0, trio.Event()

        async def run(address: str) -> None:
            nonlocal under_way
            failure = await self._try(peer_id, address, made)
            if failure is None:
                nursery.cancel_scope.cancel()
                return
            attempts.append((address[:200], *failure))
            under_way -= 1
            if not under_way:
                idle.set()

        try:
            async with trio.open_nursery() as nursery:
                for address in sorted(chosen, key=lambda each: delays.get(each, 0.0)):
                    if under_way or address == chosen[0]:
                        with trio.move_on_at(began + delays.get(address, 0.0)):
                            await idle.wait()
                    idle = trio.Event()
                    under_way += 1
                    nursery.start_soon(run, address)
        except BaseException:
            for link in made:
                link.cut()
            raise
        for late in made[1:]:
            late.cut()
        return made[0] if made else attempts

    async def _try(self, peer_id: PeerId, address: str, made: list[L]) -> tuple[str, str] | None:
        stage = "address"
        try:
            endpoint = parse_endpoint(address)
            if endpoint.peer_id not in (None, peer_id):
                return stage, f"it names another peer, {endpoint.peer_id}"
            async with self._limiter:
                with trio.fail_after(limits.DIAL_ADDRESS_TIMEOUT_S):
                    stage = "connect"
                    stream = await self._connect(endpoint)
                    stage = "authenticate"
                    try:
                        made.append(await self._secure(stream, peer_id))
                    except BaseException:
                        stream.close()
                        raise
        except InvalidRequest as error:
            return stage, error.message
        except trio.TooSlowError:
            return stage, f"no answer within {limits.DIAL_ADDRESS_TIMEOUT_S:g} s"
        except MeshmaxError as error:
            return stage, error.message
        except library.failures() as error:
            return stage, _cause(error)
        return None

    async def _connect(self, endpoint: Endpoint) -> ByteStream:
        ips = await self._transport.resolve(endpoint.host) if endpoint.name else [endpoint.host]
        if endpoint.name and not leads_here(endpoint.host):  # others' names are theirs to point where they like
            ips = [ip for ip in ips if not leads_here(ip)]
        allowed = [ip for ip in ips if self._allow(ip)]
        if not allowed:
            raise ConnectError("this mesh does not connect to that address")
        failure: OSError = OSError("the name has no address")
        for ip in allowed[: limits.MAX_DIAL_ADDRESSES]:
            try:
                return await self._transport.connect(ip, endpoint.port)
            except OSError as error:
                failure = error
        raise failure


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    while isinstance(error, BaseExceptionGroup):  # trio's, of all that it tried for one address
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.errno and error.errno > 0:  # the names' errors have numbers of their own
        return os.strerror(error.errno)
    return words_of(error)
