"""A bootstrap node: `async with open_bootstrap(config) as node`. It helps peers to meet, and has no models of its own.

home (lock) > swarm > UDP port > DHT > what is served to strangers. It is in no mesh: every peer is a guest here, bounded by
`max_guests`. No engine and no store, so that it fits the smallest machine; this module imports neither. Not here: the
services (node.serving), the faces (cli.bootstrap).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, Literal, NoReturn

import trio

from meshmax.base.config import DEFAULT_CONTROL_PORT, Config, parse_host_port
from meshmax.base.errors import StoreError
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH
from meshmax.net.addresses import allow_any
from meshmax.net.datagrams import open_datagrams
from meshmax.net.dht import open_dht
from meshmax.net.knock import knock
from meshmax.net.observer import open_observer
from meshmax.net.swarm import open_swarm
from meshmax.node.serving import Answer, Bound, OpenObserver, Serving, open_serving, reach_of, with_udp_port
from meshmax.ports import Admission, Datagrams, Signer, Swarm
from meshmax.services.look_back import Knock, knock_nowhere
from meshmax.services.observe import Attest
from meshmax.services.strangers import NoMesh
from meshmax.store.dht_file import load_dht, save_dht
from meshmax.store.home import Home, open_home
from meshmax.store.identity import load_identity
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

OTHER_OVERLAYS: Final = (
    64  # meshes whose DHT is served beside the open one's; 100 MB at the very worst, some 3 in practice
)
KEEP_S: Final = 600.0  # between two savings of what the DHT knows, for a node that is killed

# What `meshmax bootstrap` assumes where nothing is said; everything else as for a peer (base.config).
BOOTSTRAP_DEFAULTS: Final[Mapping[str, object]] = {
    "home": "~/.meshmax-bootstrap",  # beside a peer's, so that both can run on one machine, each with its identity
    "max_guests": 512,
    "serve": {"rendezvous": True, "stun": True, "observer": True, "relay": True},
}

_log = get_logger("bootstrap")


@dataclass(frozen=True)
class BootstrapWorld:
    """What a bootstrap node takes from outside: the network and the clocks."""

    open_swarm: Callable[[Config, bytes, Admission], AbstractAsyncContextManager[Swarm]]
    open_datagrams: Callable[[Config], AbstractAsyncContextManager[Datagrams]]
    open_observer: OpenObserver
    random: Any  # randbytes and random, as random.SystemRandom
    unix_now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    knock: Knock = knock_nowhere


@dataclass
class BootstrapNode:
    """A bootstrap node as faces see it."""

    config: Config
    home: Home
    swarm: Swarm
    serving: Serving
    started_at_s: float
    state: Literal["running"] = field(default="running")

    @property
    def peer_id(self) -> PeerId:
        """Who this is."""
        return self.swarm.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """What other sites may put into their configuration; loopback only where there is nothing else."""
        found = self.swarm.addresses
        return tuple(a for a in found if not a.startswith(("/ip4/127.", "/ip6/::1/"))) or found


@asynccontextmanager
async def open_bootstrap(config: Config, world: BootstrapWorld | None = None) -> AsyncIterator[BootstrapNode]:
    """A bootstrap node, running. Leaving the block ends everything. Raises ConfigError (home in use, bad addresses)."""
    world = world or real_bootstrap_world()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        home = await enter(open_home(Path(config.home).expanduser()))
        identity = load_identity(home.path)
        swarm = await enter(world.open_swarm(config, identity.private_bytes, NoMesh()))
        datagrams = await enter(world.open_datagrams(with_udp_port(config, swarm)))
        await enter(_open_dht(home, identity, datagrams, world))
        opened = open_serving(
            config,
            config.serve,
            swarm,
            datagrams,
            world.open_observer,
            world.clock,
            world.unix_now,
            besides=("dht",),
            attest=Attest(identity, world.unix_now),
            reach=reach_of(world.clock, world.knock, datagrams),
        )
        serving = await enter(opened)
        yield BootstrapNode(config, home, swarm, serving, world.unix_now())


@asynccontextmanager
async def _open_dht(home: Home, signer: Signer, datagrams: Datagrams, world: BootstrapWorld) -> AsyncIterator[None]:
    """A node of the DHT, for any mesh; what it knows is kept over restarts."""
    opened = open_dht(
        signer,
        datagrams,
        OPEN_MESH,
        random=world.random,
        unix_now=world.unix_now,
        state=load_dht(home.path),
        others=OTHER_OVERLAYS,
    )
    async with opened as dht, trio.open_nursery() as nursery:

        async def keep() -> NoReturn:
            while True:
                await trio.sleep(KEEP_S)
                await isolate("dht file", partial(trio.to_thread.run_sync, partial(save_dht, home.path, dht.dump())))

        nursery.start_soon(keep)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            try:
                save_dht(home.path, dht.dump())
            except StoreError as error:
                _log.warning("the DHT begins anew next time", error=error.message)


def real_bootstrap_world() -> BootstrapWorld:
    """TCP, UDP, the system's clock."""
    return BootstrapWorld(_open_swarm, _open_datagrams, _open_observer, SystemRandom(), knock=knock)


def _listen(config: Config) -> list[tuple[str, int]]:
    """Every interface unless something else was asked for: who runs a bootstrap node wants to be reached."""
    if config.listen:
        return [parse_host_port(text) for text in config.listen]
    return [("0.0.0.0", DEFAULT_CONTROL_PORT), ("::", DEFAULT_CONTROL_PORT)]  # noqa: S104


def _hosts(config: Config) -> list[str]:
    return list(dict.fromkeys(host for host, _ in _listen(config)))


def _open_swarm(config: Config, private_bytes: bytes, admission: Admission) -> AbstractAsyncContextManager[Swarm]:
    return open_swarm(
        private_bytes, _listen(config), allow=allow_any, admission=admission, max_guests=config.max_guests
    )


def _open_datagrams(config: Config) -> AbstractAsyncContextManager[Datagrams]:
    return open_datagrams([(host, config.dht_port) for host in _hosts(config)])


def _open_observer(config: Config, answer: Answer) -> AbstractAsyncContextManager[Bound]:
    return open_observer([(host, config.observer_port) for host in _hosts(config)], answer)
