"""Two peers behind simulated NATs who get a better path: real cores of signalling, packets of testing.sim_punch, virtual time.

A `SimSide` does what services.signalling does with a core's actions, and adopts a link by a handshake of four messages over it.
`SimSignals` is the connection over which they signal: in order, late by its latency, and lost for good when it is cut. Not
here: decisions, NATs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.base.traversal import Candidate, Purpose
from meshmax.core.attempt import Attempt
from meshmax.core.attempt_actions import (
    Action,
    Adopt,
    Drop,
    End,
    Means,
    Method,
    Prepare,
    Send,
    StartTcp,
    StartUdp,
    Stop,
)
from meshmax.core.candidates import Screen
from meshmax.core.signalling import Signalling
from meshmax.testing.sim_nat import Address, SimHost, SimInternet
from meshmax.testing.sim_punch import SimIce, SimLink, SimTcpPort
from meshmax.wire.frames import HEADER_BYTES
from meshmax.wire.signal import ATTEMPT_ID_BYTES, MESSAGES, Answer, Message, Offer

TCP_OBSERVER: Final[Address] = ("198.18.0.1", 443)
STUN: Final[Address] = ("198.18.0.1", 3478)
MAX_ROUNDS: Final = 4  # of services.signalling
GLARE_WAIT_S: Final = 3.0  # of services.signalling
_SDP: Final = (
    "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"
    "c=IN IP4 0.0.0.0\r\na=mid:0\r\na=sctp-port:5000\r\na=ice-ufrag:abcd\r\na=ice-pwd:abcdefghijklmnopqrstuv\r\n"
    f"a=fingerprint:sha-256 {':'.join(['0A'] * 32)}\r\na=setup:actpass\r\n"
)


class SimSignals:
    """The connection of two sides. ``cut_at``: when it is lost; None: never."""

    def __init__(self, net: SimInternet, latency_s: float, jitter_s: float, cut_at: float | None = None) -> None:
        self.net, self.latency_s, self._jitter_s, self._cut_at = net, latency_s, jitter_s, cut_at
        self.sides: dict[PeerId, SimSide] = {}
        self._busy_until: dict[PeerId, float] = {}  # order is kept each way

    @property
    def is_cut(self) -> bool:
        """Whether nothing passes any more."""
        return self._cut_at is not None and self.net.now >= self._cut_at

    def join(self, side: SimSide) -> None:
        """One of its ends."""
        self.sides[side.us] = side
        if self._cut_at is not None:
            self.net.at(self._cut_at, side.on_cut)

    def pass_on(self, to: PeerId, call: Callable[[], None], at_least_s: float = 0.0) -> None:
        """Call it when what is sent now has arrived there; never where the connection is lost before."""
        seconds = self.latency_s + self.net.random.random() * self._jitter_s
        when = max(self.net.now + seconds, at_least_s, self._busy_until.get(to, 0.0))
        self._busy_until[to] = when
        self.net.at(when, lambda: None if self.is_cut else call())


class SimSide:
    """One peer. ``paths``: what its attempts of control ended with, by attempt; ``wishes``: how its wishes ended."""

    def __init__(
        self, us: PeerId, peer: PeerId, host: SimHost, signals: SimSignals, screen: Screen, means: Means
    ) -> None:
        self.us, self.peer, self.host, self.screen, self.means = us, peer, host, screen, means
        self.net, self.signals = host.net, signals
        self.core = Signalling(us, lambda: bytes(int(self.net.random.random() * 256) for _ in range(ATTEMPT_ID_BYTES)))
        self.paths: dict[bytes, End] = {}
        self.wishes: list[Path | None] = []
        self.runs: dict[bytes, SimRun] = {}
        self.adopted: list[tuple[Path, SimLink, float]] = []
        self._wishing: int | None = None  # rounds left
        self._tick_at: float | None = None
        signals.join(self)

    # --- wishing, as services.signalling does ------------------------------------------------------------------------

    def want(self) -> None:
        """Wish for a better path, unless there is one."""
        if self.adopted:
            self.wishes.append(self.adopted[-1][0])
        elif self._wishing is None:
            self._wishing = MAX_ROUNDS
            self._round()

    def _round(self) -> None:
        if not self._wishing:
            self._answer_wish(None)
            return
        self._wishing -= 1
        if self.core.control(self.peer) is None:
            self.lead("control")

    def lead(self, purpose: Purpose) -> None:
        """Begin an attempt."""
        attempt, actions = self.core.want(self.peer, purpose, self.means, self.net.now)
        self.runs[attempt.id] = SimRun(self, attempt, self.net.now + 2 * self.signals.latency_s)
        if self.signals.is_cut:
            actions += attempt.on_stream_lost(self.net.now)
        self.perform(actions)

    def _answer_wish(self, path: Path | None) -> None:
        if self._wishing is not None:
            self._wishing = None
            self.wishes.append(path)

    def _after(self, end: End) -> None:
        if self._wishing is None:
            return
        if end.outcome in ("made", "failed"):
            self._answer_wish(end.path)
        elif end.outcome == "glare" and self.core.control(self.peer) is None:
            self.net.after(GLARE_WAIT_S, partial(self._unless_answered, self._wishing))
        elif end.outcome != "glare":
            self.net.after(0.0, self._round)

    def _unless_answered(self, rounds: int) -> None:
        if self._wishing == rounds and self.core.control(self.peer) is None:
            self._round()

    # --- events ------------------------------------------------------------------------------------------------------

    def on_message(self, attempt_id: bytes, message: Message, *, from_lead: bool) -> None:
        """It came on the stream of this attempt."""
        run = self.runs.get(attempt_id)
        if run is None and from_lead and isinstance(message, Offer) and attempt_id not in self.paths:
            attempt, actions = self.core.on_offer(self.peer, message, self.means, self.screen, self.net.now)
            if attempt is not None:
                self.runs[attempt_id] = SimRun(self, attempt, 0.0)
                self.perform(actions)
            else:
                for action in actions:
                    assert isinstance(action, Send)
                    self.tell(action, from_lead=False)
        elif run is not None and run.attempt.lead != from_lead:
            screen = self.screen if isinstance(message, Answer) else None
            self.perform(run.attempt.on_message(message, screen, self.net.now))

    def on_closed(self, attempt_id: bytes) -> None:
        """The other side closed the stream of this attempt."""
        if attempt_id in self.runs:
            self.perform(self.runs[attempt_id].attempt.on_stream_lost(self.net.now))

    def on_cut(self) -> None:
        """The connection is lost."""
        for run in tuple(self.runs.values()):
            self.perform(run.attempt.on_stream_lost(self.net.now))

    def change_network(self) -> None:
        """Our addresses are others."""
        self.perform(self.core.on_network_changed(self.net.now))

    # --- actions -----------------------------------------------------------------------------------------------------

    def tell(self, send: Send, *, from_lead: bool, not_before: float = 0.0) -> None:
        """Say it to the other side, as bytes."""
        body = MESSAGES.encode(send.message)[HEADER_BYTES:]
        other = self.signals.sides[self.peer]

        def arrive() -> None:
            other.on_message(send.attempt, MESSAGES.decode(body), from_lead=from_lead)

        self.signals.pass_on(self.peer, arrive, not_before)

    def perform(self, actions: Sequence[Action]) -> None:
        """Do them, and look at the clock again."""
        for action in actions:
            run = self.runs.get(action.attempt)
            if run is not None:
                run.do(action)
                if isinstance(action, End):
                    del self.runs[action.attempt]
                    self.paths[action.attempt] = action
                    other = self.signals.sides[self.peer]
                    self.signals.pass_on(self.peer, partial(other.on_closed, action.attempt))
                    self._after(action)
        self._watch()

    def _watch(self) -> None:
        due = self.core.deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.net.at(due, partial(self._tick, due))

    def _tick(self, due: float) -> None:
        if self._tick_at == due:
            self._tick_at = None
            self.perform(self.core.tick(self.net.now))


class SimRun:
    """What services.attempt does for one attempt. ``speaks_at``: when its stream is open."""

    def __init__(self, side: SimSide, attempt: Attempt, speaks_at: float) -> None:
        self.side, self.attempt, self._speaks_at = side, attempt, speaks_at
        self.tcp: SimTcpPort | None = None
        self.ice: SimIce | None = None
        self.links: dict[int, tuple[Method, SimLink]] = {}

    def do(self, action: Action) -> None:
        """See core.attempt_actions."""
        net = self.side.net
        match action:
            case Send():
                self.side.tell(
                    action, from_lead=self.attempt.lead, not_before=self._speaks_at + self.side.signals.latency_s
                )
            case Prepare():
                self._prepare(action)
            case StartTcp():
                net.at(action.at_s, partial(self._run_tcp, action))
            case StartUdp():
                self._run_udp(action)
            case Stop():
                self._stop(action.method)
            case Adopt():
                self._adopt(action)
            case Drop():
                self.links[action.number][1].closed = True
            case End():
                self._end(action)

    def _prepare(self, action: Prepare) -> None:
        net, host = self.side.net, self.side.host
        if action.tcp:
            self.tcp = port = SimTcpPort(host, partial(self._found, "punch-tcp"))
            net.after(4 * host.latency_s, lambda: self._say(self.attempt.on_tcp_ready, port.candidates(TCP_OBSERVER)))
        if action.udp:
            self.ice = ice = SimIce(host, partial(self._found, "punch-udp"), self.attempt.lead)
            if self.attempt.lead:
                ice.gather(STUN, 2 * host.latency_s, lambda found: self._say(self.attempt.on_udp_ready, _sdp(found)))

    def _say(self, event: Callable[..., list[Action]], *what: Any) -> None:
        self.side.perform(event(*what, self.side.net.now))

    def _run_tcp(self, action: StartTcp) -> None:
        if self.tcp is not None and not self.attempt.ended:
            self.tcp.run(action.targets)

    def _run_udp(self, action: StartUdp) -> None:
        assert self.ice is not None
        ice, theirs = self.ice, _candidates(action.sdp)
        if self.attempt.lead:
            ice.start(theirs)
            return

        def ready(found: tuple[Candidate, ...]) -> None:
            self._say(self.attempt.on_udp_ready, _sdp(found))
            ice.start(theirs)

        ice.gather(STUN, 2 * self.side.host.latency_s, ready)

    def _found(self, method: Method, link: SimLink) -> None:
        number = len(self.links)
        self.links[number] = (method, link)
        self._say(self.attempt.on_found, method, number)

    def _adopt(self, action: Adopt) -> None:
        """A handshake: who leads says 1 and 3, the other 2 and 4; who hears 4, or 3, has adopted."""
        _, link = self.links[action.number]
        if link.closed or self.attempt.ended:
            return
        ours, peer = self.side.us, self.side.peer

        def heard(body: Any) -> None:
            who, step = body
            if who != peer:
                self._say(self.attempt.on_adopt_failed, action.number, "somebody else is there")
                return
            if step < 4:
                link.send((ours, step + 1))
            if step >= 3:
                self._say(self.attempt.on_adopted, action.number)

        link.listen(heard)
        if action.side == "out":
            link.send((ours, 1))

    def _stop(self, method: Method) -> None:
        part = self.tcp if method == "punch-tcp" else self.ice
        if part is not None:
            part.stop()

    def _end(self, end: End) -> None:
        for part in (self.tcp, self.ice):
            if part is not None:
                part.stop()
        for number, (_, link) in self.links.items():
            link.closed = number != end.number
        if end.path is not None and end.number is not None:
            self.side.adopted.append((end.path, self.links[end.number][1], self.side.net.now))


def _sdp(candidates: Sequence[Candidate]) -> str:
    lines = (f"a=candidate:1 1 udp 1 {each.ip} {each.port} typ {each.kind}\r\n" for each in candidates)
    return _SDP + "".join(lines)


def _candidates(sdp: str) -> tuple[Candidate, ...]:
    fields = [line.split() for line in sdp.splitlines() if line.startswith("a=candidate:")]
    return tuple(Candidate("srflx", "udp", each[4], int(each[5])) for each in fields)
