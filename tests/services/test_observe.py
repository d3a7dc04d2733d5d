"""Peers learn how they are seen, and what a node does for strangers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio

from meshmax.base.doctor import TriedOutcome
from meshmax.base.errors import Busy, PeerGone, RemoteProtocolError, VersionMismatch
from meshmax.base.ids import PeerId
from meshmax.services import observe as module
from meshmax.services.observe import Attest, ObserveServer, Reach, ask_observed, ask_observer
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire import observe as wire
from meshmax.wire.frames import HEADER_BYTES
from meshmax.wire.look_back import probe_of
from meshmax.wire.protocols import OBSERVE
from meshmax.wire.voucher import Voucher, decode_voucher, verify_voucher


async def test_a_guest_is_told_its_address_the_ports_and_the_services(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1), NoMesh()) as node, network.open_swarm(SeededSigner(2)) as peer:
        ObserveServer(11435, 11437, ("stun", "relay")).register(node)
        await peer.dial(node.peer_id, node.addresses, guest=True)
        observed = await ask_observed(peer, node.peer_id)
        own = peer.addresses[0].partition("/p2p/")[0]
        assert observed == wire.Observed(own, 11435, 11437, ("stun", "relay"))


async def test_who_does_not_ask_is_not_waited_for(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as node, network.open_swarm(SeededSigner(2)) as peer:
        ObserveServer(0, 0, ()).register(node)
        await peer.dial(node.peer_id, node.addresses)
        stream = await peer.open_stream(node.peer_id, OBSERVE)
        began = trio.current_time()
        with pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert trio.current_time() - began < module.ANSWER_TIMEOUT_S + 1


async def test_a_node_that_says_nothing_garbage_or_lacks_the_protocol_is_an_error(autojump_clock: Any) -> None:
    async def mute(stream: Any) -> None:
        await trio.sleep_forever()

    async def garbage(stream: Any) -> None:
        await stream.send_all(b"\xff" * 100)

    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as node, network.open_swarm(SeededSigner(2)) as peer:
        await peer.dial(node.peer_id, node.addresses)
        with pytest.raises(VersionMismatch):
            await ask_observed(peer, node.peer_id)
        node.serve(OBSERVE, mute)
        with pytest.raises(PeerGone):
            await ask_observed(peer, node.peer_id)
        node.serve(OBSERVE, garbage)
        with pytest.raises(RemoteProtocolError):
            await ask_observed(peer, node.peer_id)


# --- packets to those who ask ----------------------------------------------------------------------------------------

IP, NONCE = "81.2.69.142", bytes(range(16))


class Wire:
    """A main UDP port, another one, and knocks; notes what went where."""

    def __init__(self) -> None:
        self.addresses = (("5.6.7.8", 11435),)
        self.sent: list[tuple[str, bytes, tuple[str, int]]] = []
        self.knocked: list[tuple[str, int]] = []
        self.knock_s = 0.0

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        self.sent.append(("main", data, to))

    def receive(self, first_bytes: range, on_datagram: Any) -> None:
        raise NotImplementedError

    def send_other(self, data: bytes, to: tuple[str, int]) -> bool:
        self.sent.append(("other", data, to))
        return True

    async def knock(self, ip: str, port: int) -> TriedOutcome:
        await trio.sleep(self.knock_s)
        self.knocked.append((ip, port))
        return "open"


@asynccontextmanager
async def open_pair(own: str = f"/ip4/{IP}/tcp/11435") -> AsyncIterator[tuple[Wire, MemorySwarm, PeerId]]:
    """A peer that is seen at ``own``, and an observer that it is a guest of."""
    network, wired = MemoryNetwork(), Wire()
    signer = SeededSigner(1)
    async with network.open_swarm(signer, NoMesh()) as node, network.open_swarm(SeededSigner(2)) as peer:
        network.move(peer, own)
        reach = Reach(trio.current_time, wired.knock, wired, wired.send_other)
        ObserveServer(11435, 0, (), Attest(signer, lambda: 1.8e9), reach).register(node)
        await peer.dial(node.peer_id, node.addresses, guest=True)
        yield wired, peer, node.peer_id


async def test_packets_go_to_the_address_that_the_question_came_from(autojump_clock: Any) -> None:
    async with open_pair() as (wired, peer, node):
        reply, _ = await ask_observer(peer, node, wire.Probe(5000, NONCE))
        assert reply == wire.Probed(True)
        reply, _ = await ask_observer(peer, node, wire.Probe(5001, NONCE, "other"))
        assert reply == wire.Probed(True)
        assert wired.sent == [("main", probe_of(NONCE), (IP, 5000)), ("other", probe_of(NONCE), (IP, 5001))]
        reply, _ = await ask_observer(peer, node, wire.Knock(5002))
        assert reply == wire.Knocked("open")
        assert wired.knocked == [(IP, 5002)]


async def test_it_vouches_for_who_asks_with_its_own_key(autojump_clock: Any) -> None:
    async with open_pair() as (_, peer, node):
        voucher = decode_voucher((await ask_observed(peer, node)).voucher)
        assert voucher.signer == node
        assert verify_voucher(voucher, 1.8e9) == Voucher(peer.peer_id, IP, 1_800_000_000)


class Relayed:
    """The answerer's end of a stream over a relay, on which ``question`` has arrived."""

    peer = SeededSigner(2).peer_id
    address = f"/ip4/5.5.5.5/tcp/1/p2p/{SeededSigner(9).peer_id}/p2p-circuit"

    def __init__(self, question: wire.FromAsker) -> None:
        self._in = wire.FROM_ASKER.encode(question)
        self.out = b""

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._in = self._in[:max_bytes], self._in[max_bytes:]
        return data

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.out += data


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (wire.Observe(), wire.Observed(Relayed.address, 1, 2)),  # and no voucher
        (wire.Knock(5002), wire.Knocked("not_tried")),
        (wire.Probe(5000, NONCE), wire.Probed(False)),
        (wire.Probe(5000, NONCE, "other"), wire.Probed(False)),
    ],
)
async def test_who_comes_over_a_relay_gets_no_packet_and_no_voucher_for_the_relays_address(
    question: wire.FromAsker, reply: wire.FromObserver, autojump_clock: Any
) -> None:
    wired, stream = Wire(), Relayed(question)
    reach = Reach(trio.current_time, wired.knock, wired, wired.send_other)
    await ObserveServer(1, 2, (), Attest(SeededSigner(1), lambda: 1.8e9), reach).answer(cast(Any, stream))
    assert wire.FROM_OBSERVER.decode(stream.out[HEADER_BYTES:]) == reply
    assert not wired.sent
    assert not wired.knocked


async def test_many_packets_are_not_to_be_had(autojump_clock: Any) -> None:
    async with open_pair() as (wired, peer, node):
        for _ in range(int(module.TRIES_BURST)):
            await ask_observer(peer, node, wire.Probe(5000, NONCE))
        with pytest.raises(Busy) as refused:
            await ask_observer(peer, node, wire.Probe(5000, NONCE))
        assert refused.value.retry_after_s
        assert len(wired.sent) == module.TRIES_BURST
        assert (await ask_observed(peer, node)).udp_port == 11435  # what costs nothing is told all the same
        await trio.sleep(3 / module.TRIES_PER_S)
        assert (await ask_observer(peer, node, wire.Knock(5002)))[0] == wire.Knocked("open")


def test_all_sources_together_get_so_many_packets_however_many_they_are() -> None:
    wired = Wire()
    server = ObserveServer(11435, 11437, (), reach=Reach(lambda: 0.0, datagrams=cast(Any, wired)))
    sent = 0
    for number in range(3 * int(module.TRIES_TOTAL_PER_S)):
        try:
            sent += server._probe(f"81.{number // 256}.{number % 256}.9", wire.Probe(5000, NONCE))
        except Busy:
            continue
    assert sent == len(wired.sent) == module.TRIES_TOTAL_PER_S


async def test_only_so_many_knocks_go_on_at_once(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACES", 2)
    async with open_pair() as (wired, peer, node):
        wired.knock_s = 2.0
        outcomes: list[str] = []

        async def knock() -> None:
            try:
                await ask_observer(peer, node, wire.Knock(5002))
                outcomes.append("tried")
            except Busy:
                outcomes.append("busy")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(knock)
        assert sorted(outcomes) == ["busy", "tried", "tried"]
        assert (await ask_observer(peer, node, wire.Knock(5002)))[0] == wire.Knocked("open")


async def test_without_the_means_nothing_is_tried(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as node, network.open_swarm(SeededSigner(2)) as peer:
        network.move(peer, f"/ip4/{IP}/tcp/1")
        ObserveServer(0, 0, ()).register(node)
        await peer.dial(node.peer_id, node.addresses)
        assert (await ask_observed(peer, node.peer_id)).voucher == b""
        assert (await ask_observer(peer, node.peer_id, wire.Knock(5002)))[0] == wire.Knocked("not_tried")
        assert (await ask_observer(peer, node.peer_id, wire.Probe(5000, NONCE)))[0] == wire.Probed(False)
