"""What a node does for strangers: rendezvous, STUN, the TCP observer, relaying; a bootstrap node all, a willing peer some.

Everything is served to anyone who proves a PeerId, or on open ports, and bounded by itself. Not here: the node around it
(node.opening, node.bootstrap), which owns swarm and UDP port.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from meshmax.base.config import DEFAULT_DHT_PORT, Config, ServeConfig
from meshmax.base.errors import ConfigError
from meshmax.net.udp_probe import send_from_other_port
from meshmax.ports import Datagrams, Swarm
from meshmax.services.look_back import Knock
from meshmax.services.observe import Attest, ObserveServer, Reach
from meshmax.services.relay_server import open_relay_server
from meshmax.services.rendezvous_server import open_rendezvous_server
from meshmax.services.stun_server import StunServer
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import REGISTRATIONS

if TYPE_CHECKING:
    from meshmax.node.running import Node

_log = get_logger("serving")

Answer = Callable[[bytes, tuple[str, int]], bytes | None]


class Bound(Protocol):
    """What listens somewhere."""

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Bound (ip, port)s."""
        ...


OpenObserver = Callable[[Config, Answer], AbstractAsyncContextManager[Bound]]


@dataclass(frozen=True)
class Serving:
    """What is served, by name, and at which ports (0: none)."""

    services: tuple[str, ...] = ()
    udp_port: int = 0
    observer_port: int = 0


@asynccontextmanager
async def open_serving(
    config: Config,
    wanted: ServeConfig,
    swarm: Swarm,
    datagrams: Datagrams | None,
    open_observer: OpenObserver | None,
    clock: Callable[[], float],
    unix_now: Callable[[], float],
    besides: tuple[str, ...] = (),
    attest: Attest | None = None,
    reach: Reach | None = None,
    relays_members: Callable[[], bool] | None = None,
) -> AsyncIterator[Serving]:
    """Serve what is ``wanted`` until the block ends. Raises ConfigError: a port is not to be had.

    ``besides``: what the caller serves, of which who asks is told, too. ``attest``, ``reach``: see services.observe.
    ``relays_members``: whether we relay for members now; None: never.
    """
    async with AsyncExitStack() as stack:
        stun = StunServer(clock)
        services = list(besides)
        udp_port = _port_of(datagrams.addresses) if datagrams is not None else 0
        observer_port = 0
        if wanted.stun and datagrams is not None:
            stun.register(datagrams)
            services.append("stun")
        if wanted.observer and open_observer is not None:
            observer = await stack.enter_async_context(open_observer(config, stun.answer))
            observer_port = _port_of(observer.addresses)
            services.append("observer")
        if wanted.rendezvous:
            rendezvous = await stack.enter_async_context(open_rendezvous_server(swarm))
            REGISTRATIONS.set_function(lambda: len(rendezvous.registrations))
            services.append("rendezvous")
        if wanted.relay or relays_members is not None:
            opened = open_relay_server(swarm, unix_now, strangers=wanted.relay, members=relays_members)
            await stack.enter_async_context(opened)
        if wanted.relay:
            services.append("relay")
        if services or udp_port:  # its number may be needed even by who wants nothing else
            ObserveServer(udp_port, observer_port, tuple(services), attest, reach).register(swarm)
        yield Serving(tuple(services), udp_port, observer_port)


@asynccontextmanager
async def open_node_serving(node: Node) -> AsyncIterator[None]:
    """Make ``node.datagrams`` and ``node.serving``: the UDP port of an ordinary peer, and what it is willing to serve.

    Raises ConfigError: a port that is needed for what is served is not to be had.
    """
    config, world = node.config, node.world
    async with AsyncExitStack() as stack:
        if world.open_datagrams is not None:
            try:
                node.datagrams = await stack.enter_async_context(
                    world.open_datagrams(with_udp_port(config, node.swarm))
                )
            except ConfigError as error:
                if config.serve.stun:
                    raise
                _log.warning("no UDP port: going on without", error=error.message)
        opened = open_serving(
            config,
            config.serve,
            node.swarm,
            node.datagrams,
            world.open_observer,
            world.clock,
            world.unix_now,
            attest=Attest(node.signer, world.unix_now),
            reach=reach_of(world.clock, world.knock, node.datagrams),
            relays_members=(lambda: node.traversal.relays_members) if config.serve.relay_members else None,
        )
        node.serving = await stack.enter_async_context(opened)
        yield


def reach_of(clock: Callable[[], float], knock: Knock, datagrams: Datagrams | None) -> Reach:
    """How a node tries the ports of those who ask how they are seen."""

    def send_other(data: bytes, to: tuple[str, int]) -> bool:
        return datagrams is not None and send_from_other_port(datagrams.addresses, data, to)

    return Reach(clock, knock, datagrams, send_other)


def with_udp_port(config: Config, swarm: Swarm) -> Config:
    """``config`` with the UDP port that peers guess: the number of the control port, unless another one was asked for."""
    if config.dht_port != DEFAULT_DHT_PORT:
        return config
    parts = (swarm.addresses or ("",))[0].split("/")
    control = parts[parts.index("tcp") + 1] if "tcp" in parts[2:] else ""
    return msgspec.structs.replace(config, dht_port=int(control)) if control.isdecimal() else config


def _port_of(addresses: Sequence[tuple[str, int]]) -> int:
    return addresses[0][1] if addresses else 0
