"""A network of UDP ports in memory: latency, loss, partitions, spoofed senders, in trio's time; satisfies ports.Datagrams.

One task delivers for all ports, whatever their number. Chance is seeded, so that a run repeats itself. What arrives at a
port calls its receivers at once, as a socket would. `MemoryNet.spoof` sends with whatever sender it is told, which is how
tests play an attacker; ``taps`` see everything that is sent. Ports get public addresses, each in a /24 of its own unless
told otherwise.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from meshmax.net.datagrams import MAX_DATAGRAM_BYTES

Address = tuple[str, int]
OnDatagram = Callable[[bytes, Address], None]
DHT_PORT = 11435


class MemoryNet:
    """The network. ``latency_s``: one way, or (least, most); ``loss``: of a datagram, 0 to 1."""

    def __init__(self, seed: int = 0, latency_s: float | tuple[float, float] = 0.02, loss: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.latency_s = (latency_s, latency_s) if isinstance(latency_s, float) else latency_s
        self.loss = loss
        self.sent = self.sent_bytes = self.delivered = 0
        self.taps: list[Callable[[bytes, Address, Address], None]] = []
        self._ports: dict[Address, MemoryDatagrams] = {}
        self._cut: Callable[[str, str], bool] = lambda _a, _b: False
        self._queue: list[tuple[float, int, bytes, Address, Address]] = []
        self._wake = trio.Event()
        self._hosts = 0

    def open(self, ip: str = "", port: int = DHT_PORT) -> MemoryDatagrams:
        """A port at ``ip``, or at the next public address."""
        if not ip:
            self._hosts += 1
            ip = f"{11 + (self._hosts >> 16)}.{self._hosts >> 8 & 255}.{self._hosts & 255}.1"
        datagrams = self._ports[ip, port] = MemoryDatagrams(self, (ip, port))
        return datagrams

    def cut(self, apart: Callable[[str, str], bool] | None) -> None:
        """From now on nothing passes between two IPs of which ``apart`` says so; None: everything passes."""
        self._cut = apart or (lambda _a, _b: False)

    def spoof(self, data: bytes, sender: Address, to: Address) -> None:
        """Send ``data`` as if it came from ``sender``."""
        for tap in self.taps:
            tap(data, sender, to)
        self.sent += 1
        self.sent_bytes += len(data)
        if self._cut(sender[0], to[0]) or (self.loss and self.random.random() < self.loss):
            return
        due_s = trio.current_time() + self.random.uniform(*self.latency_s)
        heapq.heappush(self._queue, (due_s, self.sent, data, sender, to))
        if self._queue[0][1] == self.sent:
            self._wake.set()

    def close(self, address: Address) -> None:
        """What goes there from now on is lost."""
        self._ports.pop(address, None)

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            self._wake = trio.Event()
            due_s = self._queue[0][0] if self._queue else float("inf")
            if due_s > trio.current_time() + 1e-9:  # floats: a clock that jumps may land just before
                with trio.move_on_at(due_s):
                    await self._wake.wait()
                continue
            _, _, data, sender, to = heapq.heappop(self._queue)
            port = self._ports.get(to)
            if port is not None:
                self.delivered += 1
                port.deliver(data, sender)


class MemoryDatagrams:
    """One port; satisfies ports.Datagrams."""

    def __init__(self, net: MemoryNet, address: Address) -> None:
        self._net, self.address = net, address
        self._receivers: list[tuple[range, OnDatagram]] = []

    @property
    def addresses(self) -> tuple[Address, ...]:
        """See ports.Datagrams."""
        return (self.address,)

    def send(self, data: bytes, to: Address) -> None:
        """See ports.Datagrams. An empty one, or one that the real port does not take, is dropped."""
        if 0 < len(data) <= MAX_DATAGRAM_BYTES:
            self._net.spoof(data, self.address, to)

    def receive(self, first_bytes: range, on_datagram: OnDatagram) -> None:
        """See ports.Datagrams. Raises ValueError where somebody has one of ``first_bytes`` already."""
        if any(set(first_bytes) & set(taken) for taken, _ in self._receivers):
            raise ValueError(f"datagrams that begin with {first_bytes} have a receiver already")
        self._receivers.append((first_bytes, on_datagram))

    def deliver(self, data: bytes, sender: Address) -> None:
        """Something arrives. What a receiver raises comes out, unlike at the real port: in a test it is a mistake."""
        for first_bytes, on_datagram in self._receivers:
            if data and data[0] in first_bytes:
                on_datagram(data, sender)

    def close(self) -> None:
        """Nothing arrives any more."""
        self._net.close(self.address)


@asynccontextmanager
async def open_net(
    seed: int = 0, latency_s: float | tuple[float, float] = 0.02, loss: float = 0.0
) -> AsyncIterator[MemoryNet]:
    """A network that delivers within the block."""
    net = MemoryNet(seed, latency_s, loss)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.run)
        try:
            yield net
        finally:
            nursery.cancel_scope.cancel()
