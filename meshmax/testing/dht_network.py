"""A DHT of many nodes that come and go, in virtual time: what scripts/bench_discovery measures.

Real: open_dht with its table, look-ups, storage and upkeep, announcing (services.announce), the joining of node.dht. Stand-ins:
the network (memory_datagrams), and signatures: a hash that everybody can compute, since nobody forges here and Ed25519 would
take most of the time.
Rules: nodes join through a few bootstrap nodes, which serve the overlay as one of many. Churn is Poisson: at the same rate
nodes leave, chosen at random, and new ones come; half of those that leave do so without a word, half provide nothing any more
a little earlier. The first nodes come quickly and announce when they are all there, one after the other, so that what is
measured begins in a network that has been there for a while. A look-up counts where somebody alive has announced the key, and
succeeds if it finds one that is alive. Not here: attackers, clients, meshes with certificates.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio
from blake3 import blake3

from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.model import Signed
from meshmax.base.providers import ProviderRecord
from meshmax.core.announce import Word
from meshmax.net.dht import KademliaDht, LookupFigures, open_dht
from meshmax.services.announce import Announcer
from meshmax.testing.memory_datagrams import MemoryDatagrams, MemoryNet, open_net
from meshmax.wire.dht import dht_key
from meshmax.wire.provider_records import verify_record

EPOCH_S: Final = 1.8e9
HEADERS_BYTES: Final = 28  # of IPv4 and UDP, beside each datagram
MESH: Final = MeshId("12D3KooWsimulated")
BOOTSTRAP_NODES: Final = 3
JOIN_S: Final = (2.0, 60.0)  # as in node.dht
JOIN_AGAIN_S: Final = 900.0
MIN_CONTACTS: Final = 3
MODELS_EACH: Final = 1  # it is two words: its digest and its name
FAREWELL_S: Final = 30.0  # between providing nothing and leaving, of those that leave in order
LOOK_UP_S: Final = 8.0  # as in services.providers
COUNT_S: Final = 36.0  # between countings of the nodes


class Plan(msgspec.Struct, frozen=True):
    """What is simulated. ``churn``: share of the nodes that leave in an hour; ``look_ups``: in all.

    ``grow_s``: over which the nodes come at first; ``settle_s``: in its second half they begin to announce, after it it is
    measured.
    """

    nodes: int = 1000
    hours: float = 0.3
    churn: float = 0.2
    seed: int = 1
    latency_s: tuple[float, float] = (0.005, 0.120)  # one way, of each datagram anew
    loss: float = 0.015
    look_ups: int = 1000
    grow_s: float = 600.0
    settle_s: float = 1500.0

    @property
    def round_trip_s(self) -> float:
        """The mean one."""
        return sum(self.latency_s)


class Probe(msgspec.Struct, frozen=True):
    """One look-up. ``alive``: providers of the key that were there and had announced it; ``found_alive`` of ``found`` records."""

    alive: int
    found: int
    found_alive: int
    figures: LookupFigures


class Outcome(msgspec.Struct):
    """What happened while it was measured. ``node_hours``: the nodes that were there, added up; ``wire_bytes``: with headers."""

    probes: list[Probe] = []
    node_hours: float = 0.0
    datagrams: int = 0
    wire_bytes: int = 0
    joined: int = 0
    left: int = 0
    contacts: list[int] = []


class HashSigner:
    """Signs with a hash that everybody can compute; satisfies ports.Signer."""

    def __init__(self, number: int) -> None:
        self.public_key: bytes = blake3(number.to_bytes(8, "big")).digest(32)
        self.peer_id = peer_id_of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        signature: bytes = blake3(self.public_key + data).digest(64)
        return signature


def verify_hash(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether it is a HashSigner's."""
    return bool(blake3(public_key + data).digest(64) == signature)


def unix_now() -> float:
    """Virtual Unix seconds."""
    return EPOCH_S + trio.current_time()


class _Noted:
    """A Dht that notes which keys were announced with success."""

    def __init__(self, dht: KademliaDht, held: set[bytes]) -> None:
        self._dht, self._held = dht, held
        self.join, self.find, self.moved = dht.join, dht.find, dht.moved

    @property
    def contacts(self) -> int:
        """See ports.Dht."""
        return self._dht.contacts

    @property
    def problem(self) -> str:
        """See ports.Dht."""
        return self._dht.problem

    async def announce(self, record: Signed) -> int:
        """See ports.Dht."""
        nodes = await self._dht.announce(record)
        word = verify_record(record, unix_now(), verify_hash)
        if nodes and word.addresses:
            self._held.add(word.key)
        return nodes


class Peer:
    """One node. ``held``: keys that others keep for it."""

    def __init__(self, number: int, port: MemoryDatagrams, words: tuple[Word, ...], chance: random.Random) -> None:
        self.signer, self.port, self.words = HashSigner(number), port, words
        self.announces_at_s = 0.0
        self.held: set[bytes] = set()
        self.dht: KademliaDht | None = None
        self.scope = trio.CancelScope()
        self._random = chance

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self.signer.peer_id

    async def live(self, places: tuple[tuple[str, int], ...]) -> None:
        """Until its scope is cancelled."""
        with self.scope:
            opened = open_dht(
                self.signer, self.port, MESH, random=self._random, unix_now=unix_now, verify=verify_hash
            )  # fmt: skip
            async with opened as dht, trio.open_nursery() as nursery:
                nursery.start_soon(self._join_on, dht, places)
                noted = _Noted(dht, self.held)
                ip, port = self.port.address
                addresses = (f"/ip4/{ip}/tcp/{port}",)
                announcer = Announcer(
                    self.signer, lambda: noted, lambda: MESH, lambda: self.words, lambda: addresses, unix_now, self._random
                )  # fmt: skip
                await trio.sleep_until(self.announces_at_s)
                nursery.start_soon(announcer.run)

    async def _join_on(self, dht: KademliaDht, places: tuple[tuple[str, int], ...]) -> None:
        pause_s = JOIN_S[0]
        while True:
            await dht.join(places)
            if dht.contacts >= MIN_CONTACTS:
                self.dht, pause_s = dht, JOIN_AGAIN_S
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, JOIN_S[1]) if dht.contacts < MIN_CONTACTS else JOIN_AGAIN_S

    def die(self) -> None:
        """At once, without a word."""
        self.port.close()
        self.dht = None
        self.held.clear()
        self.scope.cancel()


class DhtNetwork:
    """The nodes. ``outcome`` counts while ``measuring``."""

    def __init__(self, plan: Plan, net: MemoryNet, nursery: trio.Nursery) -> None:
        self.plan, self.net, self._nursery = plan, net, nursery
        self.random = random.Random(plan.seed)
        self.peers: list[Peer] = []
        self.outcome = Outcome()
        self.measuring = False
        self._places: tuple[tuple[str, int], ...] = ()
        self._made = 0

    def boot(self) -> None:
        """Start the bootstrap nodes."""
        for number in range(BOOTSTRAP_NODES):
            port = self.net.open()
            self._nursery.start_soon(self._bootstrap, number, port)
            self._places += (port.address,)

    async def grow(self) -> None:
        """The nodes come, one after the other."""
        all_there_s = trio.current_time() + self.plan.grow_s
        for _ in range(self.plan.nodes):
            peer = self.add()
            peer.announces_at_s = all_there_s + self.plan.settle_s * (0.5 + 0.4 * self.random.random())
            await trio.sleep(self.plan.grow_s / self.plan.nodes)

    def add(self) -> Peer:
        """One more node."""
        self._made += 1
        number = 1000 + self._made
        # A few models that many have and many that few have.
        models = [int(self.plan.nodes * self.random.random() ** 2) for _ in range(MODELS_EACH)]
        words = tuple(word for model in models for word in (Word("model", f"{model:064x}"), Word("name", f"m/{model}")))
        peer = Peer(number, self.net.open(), words, random.Random(f"{self.plan.seed}/{number}"))
        self.peers.append(peer)
        self._nursery.start_soon(peer.live, self._places)
        return peer

    async def churn(self) -> None:
        """Nodes leave and come, until cancelled; nobody if the plan says so."""
        while self.plan.churn:
            await trio.sleep(self.random.expovariate(2 * self.plan.churn * self.plan.nodes / 3600))
            if self.random.random() < 0.5:
                self.add()
                self.outcome.joined += self.measuring
            elif self.peers:
                peer = self.peers.pop(self.random.randrange(len(self.peers)))
                self._nursery.start_soon(self._leave, peer, self.random.random() < 0.5)
                self.outcome.left += self.measuring

    async def probe(self) -> None:
        """Look things up, at the plan's rate, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self.random.expovariate(self.plan.look_ups / self.plan.hours / 1800))
                ready = [peer for peer in self.peers if peer.dht is not None]
                if len(ready) > 1:
                    seeker = self.random.choice(ready)
                    provider = self.random.choice(ready)
                    nursery.start_soon(self._look_up, seeker, self.random.choice(provider.words))

    async def measure(self) -> Outcome:
        """Churn throughout. After ``settle_s`` what it costs, for ``hours``, then look-ups, for half of that."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.churn)
            await trio.sleep(self.plan.settle_s)
            sent, sent_bytes, self.measuring = self.net.sent, self.net.sent_bytes, True
            with trio.move_on_after(self.plan.hours * 3600):
                await self._count()
            self.outcome.datagrams = self.net.sent - sent
            self.outcome.wire_bytes = self.net.sent_bytes - sent_bytes + HEADERS_BYTES * self.outcome.datagrams
            with trio.move_on_after(self.plan.hours * 1800):
                await self.probe()
            nursery.cancel_scope.cancel()
        self.outcome.contacts = [peer.dht.contacts for peer in self.peers if peer.dht is not None]
        return self.outcome

    async def _count(self) -> None:
        while True:
            await trio.sleep(COUNT_S)
            self.outcome.node_hours += len(self.peers) * COUNT_S / 3600

    async def _look_up(self, seeker: Peer, word: Word) -> None:
        key = dht_key(MESH, word.kind, word.text)
        providers = {peer.peer_id for peer in self.peers if key in peer.held}
        dht = seeker.dht
        if dht is None or not providers or word in seeker.words:
            return
        records: tuple[ProviderRecord, ...] = ()
        with trio.move_on_after(LOOK_UP_S) as limit:
            records = await dht.find(key)
        if seeker.dht is None or (not limit.cancelled_caught and not dht.lookups):
            return  # it died meanwhile
        still = {peer.peer_id for peer in self.peers if key in peer.held}
        if not providers & still:
            return
        figures = dht.lookups[-1] if not limit.cancelled_caught else None
        if figures is None:
            figures = LookupFigures(True, 0, 0, LOOK_UP_S, 0, 0, LOOK_UP_S, 0)
        alive = sum(record.peer_id in still for record in records)
        self.outcome.probes.append(Probe(len(providers & still), len(records), alive, figures))

    async def _leave(self, peer: Peer, in_order: bool) -> None:
        if in_order:
            peer.words = ()
            peer.held.clear()
            await trio.sleep(FAREWELL_S)
        peer.die()

    async def _bootstrap(self, number: int, port: MemoryDatagrams) -> None:
        chance = random.Random(f"{self.plan.seed}/bootstrap {number}")
        opened = open_dht(
            HashSigner(number), port, OPEN_MESH, random=chance, unix_now=unix_now, verify=verify_hash, others=16
        )
        async with opened:
            await trio.sleep_forever()


@asynccontextmanager
async def open_network(plan: Plan) -> AsyncIterator[DhtNetwork]:
    """A network with its bootstrap nodes."""
    async with open_net(plan.seed, plan.latency_s, plan.loss) as net, trio.open_nursery() as nursery:
        network = DhtNetwork(plan, net, nursery)
        network.boot()
        await trio.sleep(1.0)
        yield network
        nursery.cancel_scope.cancel()


async def simulate(plan: Plan) -> Outcome:
    """The whole of it."""
    async with open_network(plan) as network:
        await network.grow()
        return await network.measure()
