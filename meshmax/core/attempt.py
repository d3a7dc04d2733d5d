"""One attempt at a better path between two peers, as either of them sees it: what is said, and when each method starts and ends.

The lead prepares, offers, and with the answer knows the round trip of the signalling: what passed since the offer, less what
the other took to prepare. It says Go and starts TCP half a round trip later; the other starts when Go comes, so that both start
together; for a lane it starts at once. UDP is prepared a moment later, beside it, and starts when both SDPs are there. What a
method finds the lead adopts as "out", one after another, each with a head start over the next, TCP before UDP; the other as
"in", each at once. The lead ends the attempt: with the first that is adopted, or when every method is over; the other when it
has adopted one, the lead says so, or its deadlines pass. Once methods run, the loss of the signalling stream ends nothing.

What is late, twice, of another attempt or not the sender's to say is ignored, and counted: MAX_ODD such messages end it.
Not here: which attempts there may be, glare, restarts (core.signalling), which candidates are believed (core.candidates), I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.base.traversal import PUNCH_TCP_S, PUNCH_UDP_S, Candidate, Purpose
from meshmax.core.attempt_actions import (
    Action,
    Adopt,
    Drop,
    End,
    Means,
    Method,
    Outcome,
    Prepare,
    Send,
    StartTcp,
    StartUdp,
    Stop,
    Tried,
)
from meshmax.core.candidates import Screen
from meshmax.wire.signal import (
    MAX_CANDIDATES,
    MAX_PREPARED_S,
    Answer,
    Decline,
    DeclineReason,
    Done,
    Go,
    Message,
    Offer,
    Trickle,
)

PREPARE_TCP_S: Final = 1.2  # a port is ready within 1 s (ports.Puncher)
ANSWER_S: Final = 4.0  # for the other to prepare, and two ways over a slow relay between busy machines
GO_S: Final = 4.0  # for the lead to say Go: two ways over such a relay
MAX_HALF_TRIP_S: Final = 1.0  # the longest that the lead waits after Go, whatever the other says of its preparation
HEAD_START_S: Final = 0.3  # of the stream that is being adopted over the next one; a handshake takes two round trips
UDP_LATER_S: Final = (
    0.8  # that the lead prepares TCP alone: where that works it is there by then, and a channel costs much
)
TCP_FIRST_S: Final = 0.9  # that TCP has before UDP is adopted: its second SYN after 0.3 s, and an answer from far away
ADOPT_S: Final = 3.0  # for one stream to be proved and admitted; four round trips
GRACE_S: Final = 1.0  # from the lead's word that it adopted a stream until we have
ATTEMPT_S: Final = 12.0  # no attempt is longer, whatever happens; above the sum of the longest way through it
MAX_FOUND: Final = 8  # streams of one attempt at once: candidates of a few interfaces, each way
MAX_FOUND_IN_ALL: Final = 32  # one that connects without end costs no more proofs than these
MAX_ODD: Final = 8  # messages that mean nothing; late ones are one or two
MAX_HEARD: Final = 32  # messages in all; an attempt has four, and a few trickles

_State = Literal["off", "preparing", "ready", "running", "over"]


class Attempt:
    """See the module. Times are monotonic seconds. After `End` every event is ignored."""

    __slots__ = (
        "_answered",
        "_candidates",
        "_due",
        "_found",
        "_found_in_all",
        "_free_s",
        "_heard",
        "_lost",
        "_odd",
        "_offer",
        "_outbox",
        "_screen",
        "_sdp",
        "_spoken",
        "_state",
        "_their_sdp",
        "_their_targets",
        "_tried",
        "_waiting",
        "ended",
        "id",
        "lead",
        "means",
        "peer",
        "purpose",
        "started_s",
    )  # fmt: skip

    def __init__(self, attempt_id: bytes, peer: PeerId, purpose: Purpose, means: Means, screen: Screen | None) -> None:
        """``screen`` is for the lead's offer; None: we lead, and get it with the answer."""
        self.id, self.peer, self.purpose, self.means = attempt_id, peer, purpose, means
        self.lead = screen is None
        self._screen = screen
        self.started_s = 0.0
        self.ended = False
        udp = means.udp and purpose == "control"  # a channel's pace is not a lane's
        tcp = means.tcp and not means.turn
        self._state: dict[Method, _State] = {
            "punch-tcp": "preparing" if tcp else "off",
            "punch-udp": "preparing" if udp else "off",
        }
        self._tried: list[Tried] = []
        if purpose == "control" and not udp:
            self._tried.append(("punch-udp", "prepare", means.no_udp))
        self._due: dict[str, float] = {}  # by what is late then
        self._candidates: tuple[Candidate, ...] = ()
        self._sdp = self._their_sdp = ""
        self._their_targets: tuple[Candidate, ...] = ()
        self._found: dict[int, Method] = {}  # streams that are being adopted, or wait for it
        self._waiting: list[int] = []
        self._free_s = 0.0  # when the next may be adopted
        self._offer = 0.0  # when the offer was sent or came
        self._spoken = self._answered = self._lost = False  # we offered or answered; the lead has an answer
        self._odd = self._heard = self._found_in_all = 0
        self._outbox: list[Action] = []

    # --- beginning ---------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Action]:
        """We lead: prepare."""
        self._start(now)
        return self._actions(now)

    def begin_with(self, offer: Offer, now: float) -> list[Action]:
        """We answer ``offer``: prepare."""
        self._offer = now
        if not offer.candidates and self._state["punch-tcp"] == "preparing":
            self._state["punch-tcp"] = "off"
            self._tried.append(("punch-tcp", "offer", "the peer has no way over TCP"))
        if not offer.udp and self._state["punch-udp"] == "preparing":
            self._state["punch-udp"] = "off"
            self._tried.append(("punch-udp", "offer", "the peer has no way over UDP"))
        self._start(now)
        self._take_candidates(offer.candidates)
        self._take_sdp(offer.sdp, now)
        return self._actions(now)

    def _start(self, now: float) -> None:
        self.started_s = now
        self._due["end"] = now + ATTEMPT_S
        tcp, udp = (self._state[method] == "preparing" for method in ("punch-tcp", "punch-udp"))
        if tcp:
            self._due["tcp"] = now + PREPARE_TCP_S
            self._outbox.append(Prepare(self.id, tcp=True, udp=False))
        if udp and self.lead:
            self._due["later"] = now + UDP_LATER_S

    def _prepare_udp(self, now: float) -> None:
        self._due.pop("later", None)
        self._due["udp"] = now + PUNCH_UDP_S
        self._outbox.append(Prepare(self.id, tcp=False, udp=True))

    # --- what the service tells --------------------------------------------------------------------------------------

    def on_tcp_ready(self, candidates: Sequence[Candidate], now: float) -> list[Action]:
        """The port is open; where the other may meet it."""
        if not self.ended and self._state["punch-tcp"] == "preparing":
            self._state["punch-tcp"] = "ready"
            self._due.pop("tcp")
            self._candidates = tuple(candidates)[:MAX_CANDIDATES]
        return self._actions(now)

    def on_udp_ready(self, sdp: str, now: float) -> list[Action]:
        """The channel's SDP: the lead's offer, or the other's answer to it."""
        if not self.ended and not self._sdp and self._state["punch-udp"] in ("preparing", "running"):
            self._sdp = sdp
            if self.lead:
                self._state["punch-udp"] = "ready"
            if self._spoken:
                self._send(Trickle(self.id, sdp=sdp))
        return self._actions(now)

    def on_method_over(self, method: Method, stage: str, cause: str, now: float) -> list[Action]:
        """The method ended by itself, and finds no more streams; those found are still adopted."""
        self._over(method, stage, cause)
        return self._actions(now)

    def on_found(self, method: Method, number: int, now: float) -> list[Action]:
        """The method made a stream; ``number`` is the caller's, unused before."""
        if self.ended or len(self._found) >= MAX_FOUND or self._found_in_all >= MAX_FOUND_IN_ALL:
            return [Drop(self.id, number)]
        self._found_in_all += 1
        self._found[number] = method
        self._waiting.append(number)
        return self._actions(now)

    def on_adopted(self, number: int, now: float) -> list[Action]:
        """The stream is proved to be the peer's, and in use."""
        method = self._found.get(number)
        if self.ended or method is None:
            return []
        if self.lead:
            self._send(Done(self.id, made=True))
        path: Path = "relay" if self.means.turn else "punched-tcp" if method == "punch-tcp" else "punched-udp"
        self._end(End(self.id, "made", path, number, tuple(self._tried)))
        return self._actions(now)

    def on_adopt_failed(self, number: int, cause: str, now: float) -> list[Action]:
        """The stream is not the peer's, or was lost."""
        method = self._found.pop(number, None)
        if method is not None and not self.ended:
            if number in self._waiting:
                self._waiting.remove(number)
            self._due.pop(f"adopt {number}", None)
            self._free_s = now
            self._note(method, "adopt", cause)
        return self._actions(now)

    def on_stream_lost(self, now: float, cause: str = "the connection that signalling used was lost") -> list[Action]:
        """Nothing more can be said or heard. What runs already goes on."""
        if not self.ended and not self._lost:
            self._lost = True
            for method, state in self._state.items():
                if state in ("preparing", "ready"):
                    self._over(method, "signal", cause)
            if not self.lead and not self._sdp and self._state["punch-udp"] == "running":
                self._over("punch-udp", "signal", cause)
        return self._actions(now)

    def withdraw(self, reason: DeclineReason, outcome: Outcome, now: float) -> list[Action]:
        """End it from our side, and say so."""
        if not self.ended:
            self._decline(reason, outcome)
        return self._actions(now)

    # --- what the other says -----------------------------------------------------------------------------------------

    def on_message(self, message: Message, screen: Screen | None, now: float) -> list[Action]:
        """``screen``: with an Answer, what we know now that its vouchers are here."""
        if self.ended:
            return []
        self._heard += 1
        if message.attempt != self.id or self._heard > MAX_HEARD:
            self._oddity()
        elif isinstance(message, Decline):
            self._on_decline(message)
        elif isinstance(message, Trickle):
            self._on_trickle(message, now)
        elif isinstance(message, Answer) and self.lead and self._spoken and not self._answered:
            self._screen = screen
            self._on_answer(message, now)
        elif isinstance(message, Go) and not self.lead and self._state["punch-tcp"] == "ready" and self._spoken:
            self._run_tcp(now, now)
        elif isinstance(message, Done) and not self.lead:
            self._on_done(message, now)
        else:
            self._oddity()
        return self._actions(now)

    def _on_decline(self, message: Decline) -> None:
        outcome: Outcome = {"glare": "glare", "restart": "restart"}.get(message.reason, "failed")  # type: ignore[assignment]
        if not self.lead and outcome == "glare":
            outcome = "withdrawn"
        self._note("signalling", "offer", _DECLINED[message.reason])
        self._end(End(self.id, outcome, tried=tuple(self._tried), retry_after_s=message.retry_after_s))

    def _on_trickle(self, message: Trickle, now: float) -> None:
        used = self._take_candidates(message.candidates) if message.candidates else False
        if message.sdp:
            used = self._take_sdp(message.sdp, now) or used
        if not used:
            self._oddity()

    def _on_answer(self, answer: Answer, now: float) -> None:
        self._answered = True
        self._due.pop("answer", None)
        self._take_candidates(answer.candidates)
        if self._state["punch-tcp"] == "ready":
            if answer.candidates:
                # Where the SYNs cross, each side takes the time since its own last one for the round trip, and BBR keeps the
                # least that it saw for 10 s: too little, and it sends a tenth of what the path takes. Of a lane the other one
                # sends; so our SYN goes first, and the other's measurement is of a whole round trip.
                trip_s = now - self._offer - answer.prepared_s if self.purpose == "control" else 0.0
                self._send(Go(self.id))
                self._run_tcp(now + min(max(0.0, trip_s / 2), MAX_HALF_TRIP_S), now)
            else:
                self._over("punch-tcp", "answer", "the peer has no way over TCP")
        if not answer.udp:
            self._over("punch-udp", "answer", "the peer has no way over UDP")
        self._take_sdp(answer.sdp, now)

    def _on_done(self, done: Done, now: float) -> None:
        if done.made and self._found:
            self._due["end"] = min(self._due["end"], now + GRACE_S)
        else:
            self._note(
                "signalling",
                "done",
                "the peer made a path that did not arrive here" if done.made else "the peer gave up",
            )
            self._fail()

    def _take_candidates(self, candidates: Sequence[Candidate]) -> bool:
        if self._screen is None or self._state["punch-tcp"] not in ("preparing", "ready"):
            return False
        self._their_targets = self._screen.targets((*self._their_targets, *candidates))
        return True

    def _take_sdp(self, sdp: str, now: float) -> bool:
        wanted: _State = "ready" if self.lead else "preparing"
        if not sdp or self._screen is None or self._their_sdp or self._state["punch-udp"] != wanted:
            return False
        try:
            self._their_sdp = self._screen.sdp(sdp)
        except RemoteProtocolError as error:
            self._over("punch-udp", "offer", error.message)
            return True
        if not self.lead:
            self._prepare_udp(now)
        self._state["punch-udp"] = "running"
        self._outbox.append(StartUdp(self.id, self._their_sdp))
        return True

    # --- time --------------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `tick` is due; None when it is over."""
        return min(self._due.values()) if self._due and not self.ended else None

    def tick(self, now: float) -> list[Action]:
        """End what is late."""
        for what in [what for what, at_s in self._due.items() if at_s <= now]:
            if self.ended or self._due.pop(what, None) is None:
                continue
            if what == "end":
                self._note("signalling", "attempt", f"it took longer than {ATTEMPT_S:g} s")
                self._fail()
            elif what == "later":
                self._prepare_udp(now)
            elif what == "answer":
                for method in ("punch-tcp", "punch-udp"):
                    self._over(method, "answer", f"the peer did not answer within {ANSWER_S:g} s")
            elif what == "go":
                self._over("punch-tcp", "answer", f"the peer did not say when to start within {GO_S:g} s")
            elif what in ("tcp", "udp"):
                late: Method = "punch-tcp" if what == "tcp" else "punch-udp"
                running = self._state[late] == "running"
                self._over(late, "connect" if running else "prepare", "it took too long")
            elif what != "adopt":
                number = int(what.removeprefix("adopt "))
                self._outbox.append(Drop(self.id, number))
                self._note(self._found.pop(number), "adopt", f"it took longer than {ADOPT_S:g} s")
        return self._actions(now)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _actions(self, now: float) -> list[Action]:
        """What came up, and what follows from where the methods stand."""
        if not self.ended:
            if "later" in self._due and self._state["punch-tcp"] in ("off", "over"):
                self._prepare_udp(now)
            self._speak(now)
            self._adopt_next(now)
            self._settle()
        out, self._outbox = self._outbox, []
        return out

    def _speak(self, now: float) -> None:
        """Offer or answer as soon as TCP is settled, with UDP if it is there; who has only UDP offers when that is there."""
        tcp, udp = self._state["punch-tcp"], self._state["punch-udp"]
        has_udp = udp not in ("off", "over")
        if self._spoken or self._lost or tcp == "preparing" or (tcp != "ready" and not has_udp):
            return
        if not self.lead:
            self._spoken = True
            prepared_s = min(now - self._offer, MAX_PREPARED_S)
            self._send(Answer(self.id, prepared_s, self._candidates, has_udp, self._sdp, self.means.vouchers))
            if tcp == "ready":
                self._due["go"] = now + GO_S
        elif tcp == "ready" or self._sdp:
            self._spoken = True
            self._offer = now
            self._due["answer"] = now + ANSWER_S
            self._send(
                Offer(self.id, self.purpose, self._candidates, has_udp, self._sdp, self.means.turn, self.means.vouchers)
            )

    def _adopt_next(self, now: float) -> None:
        """Adopt what waits and may go: TCP before UDP, which moves a hundredth as much; of the lead one after another."""
        while self._waiting and not self.ended:
            number = min(self._waiting, key=lambda each: (self._found[each] == "punch-udp", each))
            method = self._found[number]
            at_s = self._free_s
            if self.lead and method == "punch-udp" and self._state["punch-tcp"] not in ("off", "over"):
                if self._state["punch-tcp"] != "running":
                    return  # it starts, or is over, soon
                at_s = max(at_s, self._due["tcp"] - PUNCH_TCP_S + TCP_FIRST_S)
            if self.lead and at_s > now:
                self._due["adopt"] = at_s
                return
            self._waiting.remove(number)
            self._due.pop("adopt", None)
            self._due[f"adopt {number}"] = now + ADOPT_S
            self._free_s = now + HEAD_START_S
            self._outbox.append(Adopt(self.id, number, "out" if self.lead else "in"))

    def _settle(self) -> None:
        """End where nothing more can come of it. Who answers waits for the lead's word, as long as it can come."""
        if self.ended or self._found or any(state not in ("off", "over") for state in self._state.values()):
            return
        if self.lead:
            if self._spoken and not self._lost:
                self._send(Done(self.id, made=False))
            self._fail()
        elif not self._spoken and not self._lost:
            self._decline("not-offered", "failed")
        elif self._lost:
            self._fail()

    def _run_tcp(self, at_s: float, now: float) -> None:
        self._due.pop("go", None)
        self._state["punch-tcp"] = "running"
        self._due["tcp"] = max(at_s, now) + PUNCH_TCP_S
        self._outbox.append(StartTcp(self.id, self._their_targets, at_s))

    def _over(self, method: Method, stage: str, cause: str) -> None:
        if self.ended or self._state[method] in ("off", "over"):
            return
        self._state[method] = "over"
        if method == "punch-udp":
            self._due.pop("later", None)
        self._due.pop(method.removeprefix("punch-"), None)
        if method == "punch-tcp":
            self._due.pop("go", None)
        self._note(method, stage, cause)
        self._outbox.append(Stop(self.id, method))

    def _oddity(self) -> None:
        self._odd += 1
        if self._odd > MAX_ODD or self._heard > MAX_HEARD:
            self._note("signalling", "message", "the peer sends messages that mean nothing here")
            self._fail()

    def _note(self, what: str, stage: str, cause: str) -> None:
        self._tried.append((what, stage, cause))

    def _send(self, message: Message) -> None:
        self._outbox.append(Send(self.id, message))

    def _decline(self, reason: DeclineReason, outcome: Outcome) -> None:
        self._send(Decline(self.id, reason))
        self._note("signalling", "offer", f"ended here: {reason}")
        self._end(End(self.id, outcome, tried=tuple(self._tried)))

    def _fail(self) -> None:
        self._end(End(self.id, "failed", tried=tuple(self._tried)))

    def _end(self, end: End) -> None:
        self.ended = True
        self._due.clear()
        self._outbox.append(end)


_DECLINED: Final[dict[DeclineReason, str]] = {
    "busy": "the peer has many attempts under way; it is tried again later",
    "glare": "the peer's own offer counts",
    "not-offered": "the peer has no way that we have",
    "restart": "the peer's network changed",
    "withdrawn": "the peer wants it no more",
}
