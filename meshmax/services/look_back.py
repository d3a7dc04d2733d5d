"""Looking back: both ends of ``/meshmax/look-back/1.0.0``.

Asked, a peer tells which of its rungs named the asker and where, what address the asker comes from and what time it has, and
knocks at the ports that the asker names: at that address alone, so that nobody can have a stranger's doors tried. Asking, it
compares the clocks in the middle of the round trip and watches for the probe. Not here: how often (core.look_back), what follows
(core.doctor).
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import trio

from meshmax.base.discovery import SeenBy
from meshmax.base.doctor import LookedBack, PortKind, PortOutcome, PortSeen, TriedOutcome
from meshmax.base.errors import InvalidRequest, MeshmaxError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.reachability import NatBehaviour
from meshmax.core.look_back import LookGate
from meshmax.net.addresses import parse_endpoint
from meshmax.ports import Datagrams, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.ladder import Ladder
from meshmax.wire import look_back as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.protocols import LOOK_BACK

REQUEST_TIMEOUT_S: Final = 5.0  # for an asker's question, and for it to take the answer
ASK_TIMEOUT_S: Final = 4.5  # for an answer: the other knocks for two seconds
PROBE_WAIT_S: Final = 0.5  # for a probe that was sent before the answer; datagrams overtake each other by less

Knock = Callable[[str, int], Awaitable[TriedOutcome]]  # at an IP address and TCP port; it has its own deadline


async def knock_nowhere(_ip: str, _port: int) -> TriedOutcome:
    """Where there are no real ports, as in simulated networks."""
    await trio.lowlevel.checkpoint()
    return "not_tried"


class LookBack:
    """See the module. ``knock``: see net.knock. ``datagrams`` None: no probes, either way. ``nat``: what ours does."""

    def __init__(
        self,
        swarm: Swarm,
        ladder: Ladder,
        knock: Knock,
        unix_now: Callable[[], float],
        datagrams: Datagrams | None = None,
        nat: Callable[[], NatBehaviour | None] = lambda: None,
    ) -> None:
        self._swarm, self._ladder, self._knock, self._unix_now = swarm, ladder, knock, unix_now
        self._datagrams, self._nat = datagrams, nat
        self._gate = LookGate()
        self._arrived: dict[bytes, trio.Event] = {}
        if datagrams is not None:
            datagrams.receive(range(wire.PROBE_FIRST_BYTE, wire.PROBE_FIRST_BYTE + 1), self._on_datagram)
        swarm.serve(LOOK_BACK, self.answer)

    # --- asked -------------------------------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """Answer one question. Raises MeshmaxError for what broke the protocol."""
        frames = FrameStream(stream)
        with trio.move_on_after(REQUEST_TIMEOUT_S) as waited:
            look = await frames.receive(wire.FROM_ASKER)
        if waited.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked nothing")
        reply: wire.FromAsked
        try:
            self._gate.enter(stream.peer, trio.current_time())
        except MeshmaxError as error:
            reply = failure_of(error)
        else:
            try:
                reply = await self._seen(stream.peer, stream.address, look)
            finally:
                self._gate.leave()
        with trio.move_on_after(REQUEST_TIMEOUT_S):  # who does not take its answer loses it
            await frames.send(wire.FROM_ASKED, reply)

    async def _seen(self, peer_id: PeerId, address: str, look: wire.Look) -> wire.Seen:
        unix_s = self._unix_now()
        ip = _ip_of(address)
        tried: dict[PortKind, wire.PortTried] = {}
        async with trio.open_nursery() as nursery:
            for ask in {ask.kind: ask for ask in look.ports}.values():
                nursery.start_soon(self._try, ip, ask, look.nonce, tried)
        seen = {each.rung: each for each in self._ladder.seen(peer_id)}
        climbed = [report.name for report in self._ladder.reports() if report.state != "off"]
        rungs = [_rung_seen(name, seen.get(name)) for name in dict.fromkeys((*climbed, *seen))]
        told = tuple(rungs[: wire.MAX_RUNGS])
        return wire.Seen(told, address[: wire.MAX_ADDRESS], unix_s, tuple(tried.values()), self._nat())

    async def _try(self, ip: str, ask: wire.PortAsk, nonce: bytes, tried: dict[PortKind, wire.PortTried]) -> None:
        outcome: TriedOutcome = "not_tried"
        if ip and ask.kind == "udp":
            if self._datagrams is not None and has_way(self._datagrams, ip):
                self._datagrams.send(wire.probe_of(nonce), (ip, ask.port))
                outcome = "sent"
        elif ip:
            outcome = await self._knock(ip, ask.port)
        tried[ask.kind] = wire.PortTried(ask.kind, ask.port, outcome)

    # --- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, peer_id: PeerId, name: str, ports: Sequence[tuple[PortKind, int]]) -> LookedBack:
        """Have a connected peer look back at us; what it says, or why it said nothing. Within ASK_TIMEOUT_S and a bit."""
        connection = self._swarm.connections().get(peer_id)
        direction, where = (connection.direction, connection.address) if connection else ("out", "")
        relayed_s = None
        if (
            connection is not None and connection.path == "relay"
        ):  # its address is the relay's, and says nothing of the peer
            relayed_s, where = max(self._unix_now() - connection.opened_at_s, 0.0), ""
        blank = LookedBack(peer_id, name, direction, ours=self._ladder.seen(peer_id), at=where, relayed_s=relayed_s)
        asks = [wire.PortAsk(kind, port) for kind, port in ports if port >= wire.LOWEST_PORT][: wire.MAX_PORTS]
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        why = f"it did not answer within {ASK_TIMEOUT_S:g} s"
        arrived = self._arrived[nonce] = trio.Event()
        try:
            with trio.move_on_after(ASK_TIMEOUT_S):
                started_s, started = self._unix_now(), trio.current_time()
                seen, answered = await self._exchange(peer_id, wire.Look(nonce, tuple(asks)))
                if any(each.outcome == "sent" for each in seen.ports):
                    with trio.move_on_after(PROBE_WAIT_S):
                        await arrived.wait()
                ports_seen = _ports_seen(asks, seen.ports, arrived.is_set())
                return _looked_back(blank, seen, started_s, answered - started, ports_seen)
        except MeshmaxError as error:
            why = error.message
        finally:
            del self._arrived[nonce]
        return msgspec.structs.replace(blank, why=why)

    async def _exchange(self, peer_id: PeerId, look: wire.Look) -> tuple[wire.Seen, float]:
        stream = await self._swarm.open_stream(peer_id, LOOK_BACK)
        try:
            frames = FrameStream(stream)
            await frames.send(wire.FROM_ASKER, look)
            reply = await frames.receive(wire.FROM_ASKED)
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()
        if isinstance(reply, Failure):
            raise error_of(reply)
        return reply, trio.current_time()

    def _on_datagram(self, data: bytes, _sender: tuple[str, int]) -> None:
        nonce = wire.try_nonce(data)
        if nonce is not None and nonce in self._arrived:
            self._arrived[nonce].set()


def has_way(datagrams: Datagrams, ip: str) -> bool:
    """Whether a socket of ours can send there at all: one of the same family, and from loopback to loopback alone."""
    to = ipaddress.ip_address(ip)
    bound = [ipaddress.ip_address(host) for host, _ in datagrams.addresses]
    return any(each.version == to.version and (to.is_loopback or not each.is_loopback) for each in bound)


def _ip_of(address: str) -> str:
    """The IP address in a multiaddr of a connection; '' where there is none, as behind a relay."""
    try:
        endpoint = parse_endpoint(address)
    except InvalidRequest:
        return ""
    return "" if endpoint.name else endpoint.host


def _rung_seen(name: str, seen: SeenBy | None) -> wire.RungSeen:
    if seen is None:
        return wire.RungSeen(name[:64], None)
    return wire.RungSeen(name[:64], seen.ago_s, seen.addresses[: wire.MAX_RUNG_ADDRESSES])


def _ports_seen(asked: Sequence[wire.PortAsk], tried: Sequence[wire.PortTried], arrived: bool) -> tuple[PortSeen, ...]:
    """What came of the ports that were asked for; what is said of others counts for nothing."""
    told: dict[tuple[PortKind, int], TriedOutcome] = {(each.kind, each.port): each.outcome for each in tried}
    seen = []
    for ask in asked:
        outcome = told.get((ask.kind, ask.port), "not_tried")
        known: PortOutcome = ("arrived" if arrived else "lost") if outcome == "sent" else outcome
        seen.append(PortSeen(ask.kind, ask.port, known))
    return tuple(seen)


def _looked_back(
    blank: LookedBack, seen: wire.Seen, started_s: float, took_s: float, ports: tuple[PortSeen, ...]
) -> LookedBack:
    return msgspec.structs.replace(
        blank,
        theirs=tuple(SeenBy(each.rung, each.addresses, each.ago_s) for each in seen.rungs if each.ago_s is not None),
        their_rungs=tuple(each.rung for each in seen.rungs),
        address="" if blank.relayed_s is not None or "/p2p-circuit" in seen.address else seen.address,
        # It read its clock between our question and its answer, so that half of the time between is the best guess.
        clock_ahead_s=seen.unix_s - (started_s + took_s / 2),
        uncertain_s=took_s / 2,
        ports=ports,
        nat=seen.nat,
    )
