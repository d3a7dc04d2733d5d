"""What a node takes from outside: the network, the engine, threads, the clock, chance; and the real ones of all.

The only module that names concrete adapters of net and engine. A simulated node is the same node over another World.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import trio

from meshmax.base.config import DEFAULT_CONTROL_PORT, Config, parse_host_port
from meshmax.base.errors import MeshmaxError, without_frames
from meshmax.base.ids import PeerId, Sha256
from meshmax.core.backoff import Random
from meshmax.engine.echo import EchoEngine
from meshmax.engine.listener import owners, strangers
from meshmax.engine.llamacpp import LlamaCppEngine
from meshmax.engine.none import NoEngine
from meshmax.engine.ollama import DEFAULT_URL, OllamaEngine
from meshmax.engine.openai_compat import OpenAiEngine, api_url, key_of
from meshmax.engine.server_http import ServerHttp
from meshmax.engine.several import SeveralEngines
from meshmax.net.addresses import allow_any, is_lan_address, running_addresses
from meshmax.net.datagrams import open_datagrams
from meshmax.net.ice import open_channels
from meshmax.net.interfaces import Interface, running_interfaces
from meshmax.net.knock import knock
from meshmax.net.lanes import open_lanes
from meshmax.net.mdns import Mdns
from meshmax.net.nat_pmp import NatPmp
from meshmax.net.observer import open_observer
from meshmax.net.probes import SocketProbes
from meshmax.net.punch import TcpPuncher
from meshmax.net.registry_client import open_registry_client
from meshmax.net.static import Static
from meshmax.net.swarm import open_swarm
from meshmax.net.upnp import Upnp
from meshmax.node.serving import Answer, Bound, OpenObserver
from meshmax.ports import (
    Backend,
    Channels,
    Datagrams,
    Discovery,
    Engine,
    Lanes,
    PortMapper,
    Probes,
    Puncher,
    RunSync,
    Swarm,
)
from meshmax.services.look_back import Knock, knock_nowhere
from meshmax.services.membership import MembershipService
from meshmax.services.registries import OpenRegistry
from meshmax.services.strangers import BesideStrangers

# More would only queue at one disk. The limiter is its own, so that a stuck disk blocks nothing else.
DISK_THREADS: Final = 4

T = TypeVar("T")
Allow = Callable[[str], bool]  # whether an IP address may be dialled, and may connect


@dataclass(frozen=True)
class World:
    """What a node takes from outside: the network, the engine, threads, the clock, chance."""

    open_swarm: Callable[[Config, bytes, MembershipService], AbstractAsyncContextManager[Swarm]]
    rungs: Callable[[Config, Swarm], Sequence[Discovery]]
    engine: Callable[[Config, Path], Engine]
    run_sync: RunSync
    unix_now: Callable[[], float]
    random: Random
    open_registry: OpenRegistry | None = None  # None: no upstream registries
    open_lanes: Callable[[Config, PeerId, Allow], AbstractAsyncContextManager[Lanes]] | None = (
        None  # None: no blob lanes
    )
    open_datagrams: Callable[[Config], AbstractAsyncContextManager[Datagrams]] | None = None  # None: no UDP port
    open_observer: OpenObserver | None = None
    clock: Callable[[], float] = time.monotonic  # seconds; read in threads too wherever there are any
    addresses: Callable[[], Sequence[str]] = tuple  # of running interfaces; none ever: the network never changes
    interfaces: Callable[[], Sequence[Interface]] = tuple  # that run
    knock: Knock = knock_nowhere
    probes: Probes | None = None  # None: no ports from which observers are asked what our NAT does
    puncher: Puncher | None = None  # None: no simultaneous open
    open_channels: Callable[[], AbstractAsyncContextManager[Channels]] | None = None  # None: no ICE
    port_mappers: Callable[[], Sequence[PortMapper]] = tuple  # ways to have a router forward ports, the best first
    backends: Callable[[Config], Sequence[Backend]] = lambda config: ()  # engines that bring their own models along


def real_world() -> World:
    """libp2p, mDNS, llama.cpp, threads, the system's clock."""
    system_random = random.SystemRandom()
    return World(
        _open_swarm,
        _rungs,
        _engine,
        disk_threads(),
        time.time,
        system_random,
        open_registry_client,
        _open_lanes,
        _open_datagrams,
        _open_observer,
        addresses=running_addresses,
        interfaces=running_interfaces,
        knock=knock,
        probes=SocketProbes(),
        puncher=TcpPuncher(),
        open_channels=partial(open_channels, running_addresses),
        port_mappers=lambda: (NatPmp(), Upnp()),
        backends=_backends,
    )


def _listen(config: Config) -> list[tuple[str, int]]:
    if config.listen:
        return [parse_host_port(text) for text in config.listen]
    # Without a LAN to take part in, only this machine may reach us unless --listen says otherwise.
    hosts = ("0.0.0.0", "::") if config.lan else ("127.0.0.1",)  # noqa: S104
    return [(host, DEFAULT_CONTROL_PORT) for host in hosts]


def _open_swarm(
    config: Config, private_bytes: bytes, membership: MembershipService
) -> AbstractAsyncContextManager[Swarm]:
    def near(ip: str) -> bool:
        return membership.allows(ip, is_lan_address)

    # Who may connect is not who may be a member: strangers that we serve, and a ticket's issuer, are anywhere.
    admission = BesideStrangers(membership, lambda ip: membership.houses(ip, is_lan_address))
    allow = allow_any if config.serve.rendezvous or config.serve.relay else near
    return open_swarm(private_bytes, _listen(config), allow=allow, admission=admission, max_guests=config.max_guests)


def _open_lanes(config: Config, peer_id: PeerId, allow: Allow) -> AbstractAsyncContextManager[Lanes]:
    return open_lanes(peer_id, [(host, config.lane_port) for host in _hosts(config)], allow=allow)


def _open_datagrams(config: Config) -> AbstractAsyncContextManager[Datagrams]:
    return open_datagrams([(host, config.dht_port) for host in _hosts(config)])


def _open_observer(config: Config, answer: Answer) -> AbstractAsyncContextManager[Bound]:
    return open_observer([(host, config.observer_port) for host in _hosts(config)], answer)


def _hosts(config: Config) -> list[str]:
    return list(dict.fromkeys(host for host, _ in _listen(config)))


def _rungs(config: Config, swarm: Swarm) -> tuple[Discovery, ...]:
    static = Static(config.join)
    if not config.lan:
        return (static,)
    return (static, Mdns(swarm.peer_id, lambda: swarm.addresses, config.lan_interfaces))


def _engine(config: Config, logs: Path) -> Engine:
    match config.engine.kind:
        case "echo":
            return EchoEngine(config.engine)
        case "none":
            return NoEngine()
        case _:
            return LlamaCppEngine(config.engine, logs)


def _backends(config: Config) -> tuple[Backend, ...]:
    """The engines of others, in order of preference. Raises ConfigError."""
    found: list[Backend] = []
    if config.engine.ollama:
        found.append(_ollama(config.engine.ollama))
    servers = config.engine.openai
    found += [OpenAiEngine(each, ServerHttp(api_url(each.url), key_of(each, config.engine))) for each in servers]
    return tuple(found)


def _ollama(where: str) -> Backend:
    """The Ollama at a URL; "auto" is the one of this machine, if it is not some other person's."""
    if where != "auto":
        return OllamaEngine(ServerHttp(where))
    port, own = urlsplit(DEFAULT_URL).port or 0, os.getuid() if hasattr(os, "getuid") else 0
    return OllamaEngine(ServerHttp(DEFAULT_URL), strangers=lambda: strangers(owners(port), own))


def several_engines(own: Engine, owners: Callable[[], Mapping[Sha256, Backend]]) -> Engine:
    """A node's own engine and its backends as one."""
    return SeveralEngines(own, owners)


def disk_threads() -> RunSync:
    """A few threads for what waits for the disk. Errors that are expected leave no frame of them behind, whose variables are
    chunks: trio's own frames and an error that passes through them hold each other until garbage is looked for."""
    limiter = trio.CapacityLimiter(DISK_THREADS)

    async def run_sync(work: Callable[[], T], /) -> T:
        found, error = await trio.to_thread.run_sync(partial(_outcome, work), limiter=limiter)
        if error is None:
            return found[0]
        try:
            raise error
        finally:
            del error  # it comes to know this frame

    return run_sync


def _outcome(work: Callable[[], T]) -> tuple[list[T], MeshmaxError | OSError | None]:
    try:
        return [work()], None
    except (MeshmaxError, OSError) as error:
        return [], without_frames(error)
