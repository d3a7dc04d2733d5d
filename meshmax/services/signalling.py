"""Gets better paths to peers with whom there is a connection already: both ends of ``/meshmax/signal/1.0.0``.

Who wants a path leads an attempt, or joins the one that is under way with the peer, whoever leads it; after glare or a change of
either side's network it goes on with the attempt that counts. An attempt tries TCP and UDP side by side; what works first is
adopted by the swarm, or is given to who wanted a lane. Where nothing works and TURN servers are configured, a second attempt
goes by them. Members of a private mesh only. Not here: decisions (core.signalling, core.attempt), one attempt
(services.attempt), when a better path is wanted (services.connector).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from meshmax.base.errors import ConnectError, InvalidRequest, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.reachability import Reachability
from meshmax.base.status import Path
from meshmax.base.traversal import Purpose, TurnServer, parse_turn_url
from meshmax.core.attempt_actions import Action, End, Means
from meshmax.core.candidates import Screen
from meshmax.core.signalling import REFILL_S
from meshmax.core.signalling import Signalling as Core
from meshmax.net.addresses import parse_endpoint
from meshmax.net.interfaces import Interface
from meshmax.ports import ByteStream, Channels, Puncher, Stream, Swarm
from meshmax.services.attempt import AttemptRun, Ways
from meshmax.services.frames import FrameStream
from meshmax.services.reachability import resolve_servers
from meshmax.wire import signal as wire
from meshmax.wire.protocols import SIGNAL

OFFER_TIMEOUT_S: Final = 5.0  # for the offer of who opened a stream
GLARE_WAIT_S: Final = 3.0  # for the offer that counts, when ours was declined for it
RELAYS_KNOWN_S: Final = 60.0  # that the IP addresses of TURN servers count
MAX_ROUNDS: Final = 4  # attempts that one wish may go through: glare, and restarts as networks change


class Standing(Protocol):
    """Where we stand, and who tells us; see services.reachability."""

    @property
    def view(self) -> Reachability:
        """Our addresses as others see them."""
        ...

    @property
    def udp_blocked(self) -> bool:
        """UDP does not get out of this network."""
        ...

    @property
    def stun(self) -> tuple[tuple[str, int], ...]:
        """STUN servers."""
        ...

    @property
    def tcp_observers(self) -> tuple[tuple[str, int], ...]:
        """TCP observers."""
        ...

    @property
    def vouchers(self) -> tuple[Signed, ...]:
        """What observers say of our addresses."""
        ...


# From which IPs did the peer come to nodes that we know, as these vouch? Asked once for an offer or answer.
Vouched = Callable[[PeerId, Sequence[Signed]], frozenset[str]]


def _always() -> bool:
    return True


def _fresh_id() -> bytes:
    return secrets.token_bytes(wire.ATTEMPT_ID_BYTES)


def _none() -> tuple[Interface, ...]:
    return ()


class Signalling:
    """See the module; satisfies ports.Signals. Serves from the start; owns no tasks but those of its callers."""

    def __init__(
        self,
        swarm: Swarm,
        puncher: Puncher | None,
        channels: Channels | None,
        standing: Standing,
        *,
        vouched: Vouched,
        interfaces: Callable[[], Sequence[Interface]] = _none,
        turn: Sequence[TurnServer] = (),
        allowed: Callable[[], bool] = _always,
        new_id: Callable[[], bytes] = _fresh_id,
    ) -> None:
        """``interfaces``: ours, as they are now; may raise OSError. ``allowed``: are we in a private mesh?"""
        self.on_lane_stream: Callable[[ByteStream], Awaitable[None]] | None = None  # None: lanes are declined
        self._swarm, self._puncher, self._channels = swarm, puncher, channels
        self._standing, self._vouched, self._interfaces = standing, vouched, interfaces
        self._turn, self._allowed = tuple(turn), allowed
        self._relay_ips: frozenset[str] = frozenset()  # of the TURN servers, when they were last looked up
        self._relays_due_s = 0.0  # when they are looked up again
        self._looking_up = trio.Lock()
        self._core = Core(swarm.peer_id, new_id)
        self._runs: dict[bytes, AttemptRun] = {}
        self._begun = trio.Event()
        swarm.serve(SIGNAL, self.answer)

    # --- wanting -----------------------------------------------------------------------------------------------------

    async def traverse(self, peer_id: PeerId) -> Path:
        """See ports.Signals. Raises ConnectError with every method that was tried, Busy (too many attempts)."""
        self._check()
        end = await self._settle(peer_id, turn=False)
        if end.path is None and self._turn and self._channels is not None and not self._by_turn(peer_id):
            await self._look_up_relays()
            again = await self._settle(peer_id, turn=True)
            end = again if again.path else End(end.attempt, "failed", tried=(*end.tried, *again.tried))
        if end.path is None:
            raise ConnectError("no better path to the peer could be made.", end.tried)
        return end.path

    async def open_lane_stream(self, peer_id: PeerId) -> ByteStream:
        """A TCP connection to the peer, whose `on_lane_stream` gets the other end. Raises ConnectError, Busy.

        It has deadlines of its own. Its owner is the caller, who proves whose it is.
        """
        self._check()
        run, end = await self._lead(peer_id, "lane", turn=False)
        stream = run.take()
        if stream is None:
            raise ConnectError("no connection for a lane to the peer could be made.", end.tried)
        return stream

    def network_changed(self) -> None:
        """Our addresses are others: attempts begin again. Cheap, never blocks, called from any task."""
        self._perform(self._core.on_network_changed(trio.current_time()))

    def _check(self) -> None:
        if not self._allowed():
            raise ConnectError("paths through NAT are made in private meshes only")

    async def _settle(self, peer_id: PeerId, *, turn: bool) -> End:
        """The end of the attempts that one wish goes through."""
        tried: tuple[tuple[str, str, str], ...] = ()
        end = End(b"", "failed")
        for _ in range(MAX_ROUNDS):
            under_way = self._core.control(peer_id)
            if under_way is not None and under_way.id in self._runs:
                run = self._runs[under_way.id]
                await run.ended.wait()
                end = run.end or end
            else:
                _, end = await self._lead(peer_id, "control", turn=turn)
            tried += end.tried
            if end.outcome == "glare":
                await self._other_offer(peer_id)
            elif end.outcome in ("made", "failed"):
                break
        return End(end.attempt, end.outcome, end.path, end.number, tried if end.path is None else ())

    async def _other_offer(self, peer_id: PeerId) -> None:
        with trio.move_on_after(GLARE_WAIT_S):
            while self._core.control(peer_id) is None:
                await self._begun.wait()

    async def _lead(self, peer_id: PeerId, purpose: Purpose, *, turn: bool) -> tuple[AttemptRun, End]:
        means = self._means(turn=turn)
        attempt, actions = self._core.want(peer_id, purpose, means, trio.current_time())
        run = self._run_of(
            attempt.id, AttemptRun(attempt, self._swarm, self._ways(), self._screener(peer_id), self._perform)
        )
        try:
            return run, await run.run(actions)
        finally:
            del self._runs[attempt.id]

    # --- answering ---------------------------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """One attempt of a peer's. Raises PeerGone, RemoteProtocolError."""
        frames = FrameStream(stream)
        with trio.move_on_after(OFFER_TIMEOUT_S) as scope:
            offer = await frames.receive(wire.MESSAGES)
        if scope.cancelled_caught or not isinstance(offer, wire.Offer):
            raise RemoteProtocolError("the peer opened a stream for signalling and offered nothing")
        if not self._allowed() or (offer.purpose == "lane" and self.on_lane_stream is None):
            await frames.send(wire.MESSAGES, wire.Decline(offer.attempt, "not-offered"))
            return
        if offer.turn:
            await self._look_up_relays()
        if offer.attempt in self._runs:  # one that ended lives on while it says its last word: it is not to be mixed up
            await frames.send(wire.MESSAGES, wire.Decline(offer.attempt, "busy", REFILL_S))
            return
        screen = self._screen(stream.peer, offer.vouchers)
        attempt, actions = self._core.on_offer(
            stream.peer, offer, self._means(turn=offer.turn), screen, trio.current_time()
        )
        if attempt is None:
            for action in actions:
                await frames.send(wire.MESSAGES, action.message)  # type: ignore[union-attr]
            return
        run = self._run_of(
            attempt.id, AttemptRun(attempt, self._swarm, self._ways(), self._screener(stream.peer), self._perform)
        )
        try:
            end = await run.run(actions, frames)
        finally:
            del self._runs[attempt.id]
        lane = run.take() if end.outcome == "made" and offer.purpose == "lane" else None
        if lane is not None and self.on_lane_stream is not None:
            await self.on_lane_stream(lane)

    async def _look_up_relays(self) -> None:
        async with self._looking_up:  # whoever comes meanwhile needs them, too
            if trio.current_time() >= self._relays_due_s:  # so that offers without end ask no name server without end
                servers = await resolve_servers([parse_turn_url(server.url) for server in self._turn])
                self._relay_ips = frozenset(ip for ip, _ in servers)
                self._relays_due_s = trio.current_time() + RELAYS_KNOWN_S

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _run_of(self, attempt_id: bytes, run: AttemptRun) -> AttemptRun:
        self._runs[attempt_id] = run
        self._begun.set()
        self._begun = trio.Event()
        return run

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            run = self._runs.get(action.attempt)
            if run is not None:
                run.do(action)
        for run in self._runs.values():
            run.look_again()

    def _means(self, *, turn: bool) -> Means:
        standing = self._standing
        by_turn = turn and bool(self._turn)
        blocked = standing.udp_blocked and not by_turn
        return Means(
            tcp=self._puncher is not None and not turn,
            udp=self._channels is not None and not blocked,
            turn=turn,
            no_udp="UDP does not get out of this network" if blocked else "there is no UDP here",
            vouchers=standing.vouchers[: wire.MAX_VOUCHERS],
        )

    def _ways(self) -> Ways:
        standing = self._standing
        return Ways(self._puncher, self._channels, standing.tcp_observers, standing.stun, self._turn)

    def _by_turn(self, peer_id: PeerId) -> bool:
        view = self._swarm.connections().get(peer_id)
        return view is not None and view.path == "relay" and "/udp/" in view.address

    def _screener(self, peer_id: PeerId) -> Callable[[wire.Answer], Screen]:
        return lambda answer: self._screen(peer_id, answer.vouchers)

    def _screen(self, peer_id: PeerId, vouchers: Sequence[Signed]) -> Screen:
        try:
            interfaces = tuple(self._interfaces())
        except OSError:
            interfaces = ()  # then private candidates need an external address in common
        view = self._swarm.connections().get(peer_id)
        connected = _ip_of(view.address) if view is not None and view.path != "relay" else ""
        return Screen(
            vouched=self._vouched(peer_id, vouchers).__contains__,
            connected=frozenset({connected} - {""}),
            subnets=tuple(text for each in interfaces for text in each.networks),
            own=frozenset(ip for each in interfaces for ip in each.ips),
            external=frozenset(self._standing.view.external_ips),
            relays=self._relay_ips,
        )


def _ip_of(address: str) -> str:
    """The IP address in a connection's multiaddr; '' where there is none."""
    try:
        endpoint = parse_endpoint(address.replace("/udp/", "/tcp/"))
    except InvalidRequest:
        return ""
    return "" if endpoint.name else endpoint.host
