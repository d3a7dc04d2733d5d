"""Many DHT nodes on a network in memory, in virtual time; and attackers among them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio
from blake3 import blake3

from meshmax.base.ids import public_key_of
from meshmax.base.membership import OPEN_MESH
from meshmax.base.providers import ProviderRecord
from meshmax.net.dht import KademliaDht, open_dht
from meshmax.testing.memory_datagrams import Address, MemoryDatagrams, MemoryNet, open_net
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.dht import (
    FIRST_BYTES,
    Body,
    Contact,
    Envelope,
    decode_body,
    decode_header,
    dht_key,
    encode_datagram,
    node_id_of,
    overlay_tag,
)
from meshmax.wire.provider_records import sign_record

EPOCH_S = 1.8e9
TAG = overlay_tag(OPEN_MESH)


def unix_now() -> float:
    return EPOCH_S + trio.current_time()


class CheapSigner:
    """Signs with a hash that everybody can compute: for crowds, where nobody forges."""

    def __init__(self, seed: int) -> None:
        self.peer_id = SeededSigner(seed).peer_id
        self.public_key = public_key_of(self.peer_id)

    def sign(self, data: bytes) -> bytes:
        signature: bytes = blake3(self.public_key + data).digest(64)
        return signature


def cheap_verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    return bool(blake3(public_key + data).digest(64) == signature)


def key_of(word: str) -> bytes:
    return dht_key(OPEN_MESH, "model", word)


class Crowd:
    """The network and its honest nodes. ``cheap``: signatures are hashes, so that a thousand nodes take seconds."""

    def __init__(self, net: MemoryNet, stack: AsyncExitStack, cheap: bool) -> None:
        self.net, self._stack, self.cheap = net, stack, cheap
        self.nodes: list[KademliaDht] = []
        self.signers: list[Any] = []
        self.ports: list[MemoryDatagrams] = []

    def signer(self, seed: int) -> Any:
        return CheapSigner(seed) if self.cheap else SeededSigner(seed)

    async def add(self, seed: int, *, ip: str = "", join: Sequence[Address] = (), **options: Any) -> KademliaDht:
        """Another node."""
        signer, port = self.signer(seed), self.net.open(ip)
        if self.cheap:
            options["verify"] = cheap_verify
        opened = open_dht(signer, port, OPEN_MESH, random=random.Random(seed), unix_now=unix_now, **options)
        dht = await self._stack.enter_async_context(opened)
        self.nodes.append(dht)
        self.signers.append(signer)
        self.ports.append(port)
        if join:
            for _ in range(5):  # greetings may be lost
                if await dht.join(join):
                    break
            assert dht.contacts
        return dht

    async def grow(self, count: int, first_seed: int = 1, pause_s: float = 0.5) -> None:
        """``count`` nodes, each joining by one that is there, then time for their tables to fill."""
        for index in range(count):
            there = [port.address for port in self.ports[:4]]
            await self.add(first_seed + index, join=there[-1:])
            await trio.sleep(pause_s)
        await trio.sleep(700)

    def encoded(self, index: int, key: bytes, sequence: int = 1, ttl_s: int = 7200) -> Any:
        """A signed record of the node ``index``."""
        now_s, signer = int(unix_now()), self.signers[index]
        addresses = (f"/ip4/{self.ports[index].address[0]}/tcp/11435",)
        return sign_record(ProviderRecord(key, signer.peer_id, sequence, now_s, now_s + ttl_s, addresses), signer.sign)


@asynccontextmanager
async def open_crowd(count: int = 0, *, seed: int = 1, cheap: bool = False, loss: float = 0.0) -> AsyncIterator[Crowd]:
    async with open_net(seed, (0.01, 0.04), loss) as net, AsyncExitStack() as stack:
        crowd = Crowd(net, stack, cheap)
        if count:
            await crowd.grow(count)
        yield crowd


class Stranger:
    """Somebody who speaks the protocol by hand: says what it likes and hears everything."""

    def __init__(
        self, net: MemoryNet, signer: Any, ip: str = "", port: MemoryDatagrams | None = None, said: int = 0
    ) -> None:
        self.net, self.signer = net, signer
        self.port = port or net.open(ip)
        self.public_key = public_key_of(signer.peer_id)
        self.node_id = node_id_of(self.public_key)
        self._said = said
        self.heard: list[tuple[Envelope, Body, int]] = []
        self.answer: Callable[[Envelope, Body, Address], Body | None] = lambda _e, _b, _a: None
        if port is None:
            self.port.receive(FIRST_BYTES, self.take)

    @property
    def contact(self) -> Contact:
        return Contact(self.public_key, *self.port.address)

    def datagram(
        self, body: Body, receiver: bytes, request: bytes = b"12345678", *, time_s: float | None = None
    ) -> bytes:
        now_ms = int((unix_now() if time_s is None else time_s) * 1000)
        return encode_datagram(TAG, self.public_key, receiver, now_ms, request, False, body, self.signer.sign)

    async def say(self, body: Body, dht: KademliaDht, to: Address) -> list[Body]:
        """Ask, and what was answered within a second."""
        before, self._said = len(self.heard), self._said + 1
        request = self._said.to_bytes(8, "big")
        self.port.send(self.datagram(body, dht.endpoint.node_id, request), to)
        await trio.sleep(1.0)
        return [heard for _, heard, _ in self.heard[before:]]

    def take(self, data: bytes, sender: Address) -> None:
        envelope = decode_header(data)
        if envelope.receiver not in (self.node_id, bytes(20)):
            return
        body = decode_body(envelope)
        self.heard.append((envelope, body, len(data)))
        reply = None if envelope.answer else self.answer(envelope, body, sender)
        if reply is not None:
            self.port.send(self.datagram(reply, node_id_of(envelope.sender), envelope.request), sender)
