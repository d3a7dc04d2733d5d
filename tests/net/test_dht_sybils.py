"""A thousand made-up identities near a key: how often the key is still found. Printed with -s; virtual time."""

from __future__ import annotations

import heapq
import random
from typing import Any

from meshmax.base.ids import peer_id_of
from meshmax.base.providers import KEY_BYTES, ProviderRecord
from meshmax.net.dht import make_node_id
from meshmax.wire.dht import (
    MAX_CONTACTS,
    Body,
    Contact,
    Envelope,
    Find,
    Found,
    Ping,
    Pong,
    Stored,
    node_id_of,
    pack_contact,
)
from meshmax.wire.provider_records import encode_record, sign_record
from tests.net.dht_site import CheapSigner, Crowd, Stranger, key_of, open_crowd, unix_now

HONEST = 200
FAKES = 1000
# What the fakes do, and in how many networks they are. More seeds were tried by hand: docs/security.md has the figures.
ATTACKS = (("mute", FAKES), ("censor", FAKES), ("inventor", FAKES), ("censor", 20), ("forger", FAKES))


class FakeSigner(CheapSigner):
    """An identity of which only the number counts: in this simulation a signature is a hash."""

    def __init__(self, public_key: bytes) -> None:
        self.public_key, self.peer_id = public_key, peer_id_of(public_key)


class Swarm:
    """Fakes around a key: they know each other, answer in concert, take every record, and give none back."""

    def __init__(self, crowd: Crowd, target: bytes, manner: str, chance: random.Random, subnets: int) -> None:
        self.manner, self.chance, self.target = manner, chance, int.from_bytes(target, "big")
        # One honest in ten of the true nearest: the fakes lie ten times as dense as the honest nodes do.
        span = FAKES * (1 << 160) // (HONEST * 9)
        near: list[tuple[int, bytes]] = []
        while len(near) < FAKES:
            public_key = chance.randbytes(32)
            distance = int.from_bytes(node_id_of(public_key), "big") ^ self.target
            if distance < min(span, 1 << 160):
                near.append((distance, public_key))
        self.fakes: list[Stranger] = []
        for number, (_, public_key) in enumerate(sorted(near)):
            network = number % subnets
            ip = f"{40 + (network >> 8)}.{network & 255}.{chance.randrange(256)}.{1 + number // subnets}"
            fake = Stranger(crowd.net, FakeSigner(public_key), ip=ip)
            fake.answer = self.answer
            self.fakes.append(fake)

    def answer(self, _envelope: Envelope, body: Body, _sender: Any) -> Body | None:
        if isinstance(body, Ping):
            return Pong()
        if self.manner == "mute":
            return None
        if not isinstance(body, Find):
            return Stored(True)
        if self.manner == "inventor":
            named = [Contact(self.chance.randbytes(32), f"77.{n}.{self.chance.randrange(256)}.1", 9) for n in range(20)]
        else:
            wanted = int.from_bytes(body.target[:20], "big")
            nearest = heapq.nsmallest(100, self.fakes, key=lambda f: int.from_bytes(f.node_id, "big") ^ wanted)
            named = [fake.contact for fake in self.chance.sample(nearest, MAX_CONTACTS)]
        if self.manner == "forger" and len(body.target) == KEY_BYTES:  # providers that do not exist, without end
            records = tuple(sorted((self.forged(body.target) for _ in range(3)), key=make_node_id))
            return Found(tuple(pack_contact(contact) for contact in named[:10]), records, more=True)
        return Found(tuple(pack_contact(contact) for contact in named))

    def forged(self, key: bytes) -> bytes:
        signer, now_s = FakeSigner(self.chance.randbytes(32)), int(unix_now()) + 200  # newer than honest ones
        word = ProviderRecord(key, signer.peer_id, 1, now_s, now_s + 7200, ("/ip4/40.1.2.3/tcp/1",))
        return encode_record(sign_record(word, signer.sign))


async def enter_tables(crowd: Crowd, swarm: Swarm) -> None:
    """Each fake says hello to some honest nodes, which find later that it can be reached."""
    for fake in swarm.fakes:
        await crowd.nodes[swarm.chance.randrange(HONEST)].protocol.call_hello(fake.port.address)


async def attacked(crowd: Crowd, word: str, manner: str, chance: random.Random, subnets: int) -> tuple[bool, int]:
    key = key_of(word)
    provider, seeker = chance.sample(range(HONEST), 2)
    for node in (crowd.nodes[provider], crowd.nodes[seeker]):  # what an hour of ordinary life does
        for _ in range(8):
            await node.look_up(chance.randbytes(20))
    swarm = Swarm(crowd, key[:20], manner, chance, subnets)
    await enter_tables(crowd, swarm)
    await crowd.nodes[provider].announce(crowd.encoded(provider, key))
    found = await crowd.nodes[seeker].find(key)
    figures = crowd.nodes[seeker].lookups[-1]
    for fake in swarm.fakes:
        fake.port.close()
    return any(record.peer_id == crowd.signers[provider].peer_id for record in found), figures.asked


async def test_a_key_is_found_though_nine_in_ten_of_its_nearest_nodes_are_fakes(autojump_clock: Any) -> None:
    chance = random.Random(11)
    async with open_crowd(seed=7, cheap=True) as crowd:
        await crowd.grow(HONEST)
        results = []
        for manner, subnets in ATTACKS:
            ok, asked = await attacked(crowd, f"{manner} {subnets}", manner, chance, subnets)
            print(f"\n{manner} of {subnets} networks: {'found' if ok else 'not found'}, {asked} nodes asked")
            results.append(ok)
    assert all(results)
