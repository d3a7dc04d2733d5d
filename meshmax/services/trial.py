"""One request at one peer, ourselves too: asks, passes on what comes, measures, and tells what it came to.

Rules: the time in which the client took nothing is not the peer's. What was cancelled because another peer was faster says
nothing of the peer but that it was slower than that. An answer of our own does not touch the wire. Not here: which peer, and
what a failure leads to (core.delivery).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import cache
from typing import Final, Protocol

import trio

from meshmax.base.errors import (
    Busy,
    ConnectError,
    Draining,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    MeshmaxError,
    PeerGone,
)
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask, Delta, EmbedRequest, Event, Finish, is_load_only
from meshmax.core.breaker import MAX_BACKOFF_S, OWN_BACKOFF_S
from meshmax.core.contender import Contender
from meshmax.core.estimate import ahead_of
from meshmax.core.hedging import FirstTokens
from meshmax.core.measurements import MIN_LOAD_S, Measurements
from meshmax.core.memory_fit import device_of
from meshmax.core.outstanding import Outstanding
from meshmax.core.retrying import is_final
from meshmax.core.told_wait import ToldWaits
from meshmax.ports import Presence, Residency, Swarm
from meshmax.services.comebacks import Comebacks
from meshmax.services.infer_client import Step, open_remote_answer
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import FIRST_TOKEN, REQUESTS

CONTENDED: Final = 0.2  # share of time spent in the caller above which a decode rate says nothing about the peer

_OF_ONE_PEER: Final = (
    PeerGone,
    ConnectError,
    EngineError,
    EngineUnavailable,
    EngineCrashed,
)  # another one might do better
_OF_THE_WHOLE_PEER: Final = ("peer_gone", "connect", "version_mismatch", "remote_protocol")  # not of one model on it

_OF_ITSELF: Final = "this peer "  # how what a peer says of itself begins (core.draining)

TryNext = Callable[[], Awaitable[Sequence[Event] | None]]  # more of an answer, None at its end

_log = get_logger("trial")
_requests, _first_token = cache(REQUESTS.labels), cache(FIRST_TOKEN.labels)


class Feed(Protocol):
    """Takes what comes."""

    def on_step(self, step: Step) -> None:
        """The peer lives."""
        ...

    async def send(self, events: Sequence[Event]) -> float:
        """The peer spoke. Waits while the client takes nothing; how long that was, in seconds."""
        ...


class Bench:
    """What trials of one node share."""

    def __init__(
        self, swarm: Swarm, residency: Residency, presence: Presence, peer_id: PeerId, measurements: Measurements
    ) -> None:
        self.measurements = measurements
        self.outstanding = Outstanding()
        self.waits = ToldWaits()
        self.first_tokens = FirstTokens()
        self.peer_id = peer_id
        self.comebacks = Comebacks(presence, measurements.breakers)
        self.on_news: Callable[[], None] = lambda: None  # called when another peer may be asked, or not any more
        self.swarm, self.residency, self._presence = swarm, residency, presence

    def sequence(self, peer: PeerId) -> int:
        """Of the newest status of ``peer``; 0 if there is none."""
        view = self._presence.view(peer)
        return view.status.sequence if view and view.status else 0


class Trial:
    """One request at one peer; `begin`, then `run` in a task. ``name``: what people call the peer, '' for ourselves.

    ``blame``: set it before cancelling, where the peer is the reason.
    """

    def __init__(self, bench: Bench, ask: Ask, contender: Contender, name: str, expected_s: float) -> None:
        """``expected_s``: until the first event."""
        self._bench, self._ask, self._contender, self._name = bench, ask, contender, name
        self._peer = contender.view.peer_id
        self._device = device_of(contender.model, contender.view.status)
        self._expected_s = expected_s
        self._where = "remote" if name else "local"
        self._sent_s = trio.current_time()
        self._first_event_s = 0.0  # 0 until it is there
        self._held_s = 0.0
        self._tokens = 0  # after the first event
        self._last_event_s = 0.0
        self._outcome = "cancelled"
        self._sequence = 0  # of the peer's status when it began
        self._probe = False
        self.blame: MeshmaxError | None = None

    def begin(self) -> None:
        """It counts from now on, before its task has run: requests that come together are decided one after the other.

        `run` must follow, cancelled or not.
        """
        self._sequence = self._bench.sequence(self._peer)
        self._bench.outstanding.on_sent(self._peer, self._sequence)
        self._probe = self._bench.measurements.breakers.on_probe_sent(self._peer, self._ask.digest, self._sent_s)
        if self._probe:
            self._bench.on_news()

    async def run(self, feed: Feed) -> None:
        """Returns when the whole answer was passed on. Raises what the peer or the engine says."""
        bench = self._bench
        try:
            if self._peer == bench.peer_id:
                async with bench.residency.open_answer(self._ask) as events:
                    await self._pass_on(_one_by_one(events), feed)
            else:
                on_step = self._reaching(feed.on_step) if self._probe else feed.on_step
                async with open_remote_answer(bench.swarm, self._peer, self._ask, on_step) as remote:
                    await self._pass_on(remote.try_next, feed)
        except MeshmaxError as error:
            self._on_error(error)
            raise self._named(error) from None
        finally:
            bench.outstanding.on_ended(self._peer, self._sequence, bench.sequence(self._peer))
            self._on_cancelled(self._probe)
            bench.on_news()
            _requests(where=self._where, outcome=self._outcome).inc()

    def _reaching(self, on_step: Callable[[Step], None]) -> Callable[[Step], None]:
        """``on_step``, and that the peer can be reached as soon as it takes the probe."""

        def told(step: Step) -> None:
            if step == "accepted":
                self._bench.measurements.breakers.on_reached(self._peer)
                self._bench.on_news()
            on_step(step)

        return told

    async def _pass_on(self, try_next: TryNext, feed: Feed) -> None:
        while (events := await try_next()) is not None:
            now = trio.current_time()
            if not self._first_event_s:
                self._on_first(now)
            else:
                self._tokens += sum(_spoken(event) for event in events if isinstance(event, Delta))
            self._last_event_s = now
            if isinstance(last := events[-1], Finish):
                self._on_finish(last, now)
            self._held_s += await feed.send(events)
        if self._outcome != "ok":
            raise PeerGone("the answer ended before it was whole")

    def _on_first(self, now: float) -> None:
        self._first_event_s = max(now - self._sent_s, 1e-9)
        _first_token(where=self._where).observe(self._first_event_s)
        self._bench.measurements.breakers.on_success(self._peer, self._ask.digest)
        self._bench.on_news()  # also where it is no probe, but was asked for before the circuit opened
        if not is_load_only(self._ask.request):
            self._bench.first_tokens.add(self._peer, self._expected_s, self._first_event_s)

    def _on_finish(self, finish: Finish, now: float) -> None:
        self._outcome = "ok"
        model, measured = self._contender.model, self._bench.measurements
        if is_load_only(self._ask.request):
            return
        span_s = now - self._sent_s - self._first_event_s
        fair = self._held_s <= CONTENDED * span_s
        load_s = min(finish.load_s, self._first_event_s)
        # One that was cut off would have been longer: it counts where it tells of longer answers than we know.
        cut = finish.done_reason != "stop" and finish.output_tokens <= (measured.answer_tokens(model.digest) or 0)
        if finish.output_tokens > 0 and not cut:
            measured.on_answer(model.digest, finish.output_tokens, now)
        # Vectors come as each text is read, so the prompt is read when the last one is there.
        embeds = isinstance(self._ask.request, EmbedRequest)
        waited_s = self._first_event_s + (span_s if embeds else 0.0)
        prompt_s = 0.0 if embeds else min(finish.prompt_s, waited_s)
        if prompt_s > 0:
            queued_s = waited_s - (measured.rtt_s(self._peer) or 0.0) - load_s - prompt_s
            measured.on_wait(self._peer, queued_s, self._contender.load, now)
            self._bench.waits.on_waited(self._peer, self._contender.told, queued_s)
        idle = self._contender.is_ready and self._free and load_s < MIN_LOAD_S and (fair or not embeds)
        if prompt_s > 0 or idle:
            measured.on_first_token(
                self._peer,
                model.digest,
                self._device,
                waited_s=waited_s,
                prompt_tokens=finish.prompt_tokens - finish.cached_tokens,
                now=now,
                prompt_s=prompt_s,
                size=model.size,
            )
        measured.on_finish(
            self._peer,
            model.digest,
            self._device,
            tokens=self._tokens if fair else 0,
            span_s=span_s,
            load_s=load_s,
            now=now,
            beside=self._beside,
            size=model.size,
        )

    @property
    def _free(self) -> bool:
        load = self._contender.load
        return load.running + load.queued < load.capacity

    def _on_error(self, error: MeshmaxError) -> None:
        self._outcome = "failed"
        if is_final(error, ours=not self._name):
            return  # it speaks of the request, not of the peer
        if isinstance(error, Busy) and not self._name:
            return  # our own queue is asked each time, which costs nothing
        digest = None if error.code in _OF_THE_WHOLE_PEER else self._ask.digest
        pause_s = error.retry_after_s if isinstance(error, Busy) else 0.0
        self._bench.measurements.breakers.on_failure(
            self._peer,
            digest,
            error.code,
            trio.current_time(),
            pause_s,
            self._ask.priority,
            sent_s=self._sent_s,
            most_s=MAX_BACKOFF_S if self._name else OWN_BACKOFF_S,
            reason=error.message,
        )
        if self._name:
            self._bench.comebacks.on_failed(self._peer)

    def _on_cancelled(self, probe: bool) -> None:
        if self._outcome == "cancelled" and self.blame is not None:
            self._on_error(self.blame)
        elif self._outcome == "cancelled" and not is_load_only(self._ask.request):
            self._on_left()
        if probe:
            self._bench.measurements.breakers.on_probe_ended(self._peer, self._ask.digest, self._sent_s)

    def _on_left(self) -> None:
        """The client left, or another peer was faster: what that tells of this one."""
        model, load, now = self._contender.model, self._contender.load, trio.current_time()
        measured, first_tokens = self._bench.measurements, self._bench.first_tokens
        if self._first_event_s:
            span_s = self._last_event_s - self._sent_s - self._first_event_s
            if self._held_s <= CONTENDED * span_s:
                measured.on_left(self._peer, model.digest, self._device, self._tokens, span_s, now, self._beside)
            return
        # It would have taken longer than that; without these only the quick ones would count.
        waited_s = now - self._sent_s
        if waited_s > first_tokens.late_s(self._peer, self._expected_s):
            loaded = self._contender.is_ready
            measured.on_no_word(self._peer, model.digest, self._device, waited_s, load, now, loaded=loaded)
            self._bench.waits.on_waited(self._peer, self._contender.told, waited_s)
        if waited_s > self._expected_s:
            first_tokens.add(self._peer, self._expected_s, waited_s)

    @property
    def _beside(self) -> int:
        """How many other answers the peer gave meanwhile, as far as we know."""
        load = self._contender.load
        return min(ahead_of(load), max(load.capacity, 1) - 1)

    def _named(self, error: MeshmaxError) -> MeshmaxError:
        """``error`` with the peer's name where it speaks of that peer, its connection or its engine."""
        if self._name and isinstance(error, Draining) and error.message.startswith(_OF_ITSELF):
            said = f"{self._name} {error.message.removeprefix(_OF_ITSELF)}"
            return Draining(said, error.retry_after_s, stopping=error.stopping)
        if not self._name or type(error) not in _OF_ONE_PEER:
            return error
        if isinstance(error, PeerGone | ConnectError):  # why it did is of the network's words: for the log
            _log.info("peer lost", request_id=self._ask.request_id, peer=self._peer, why=error.message)
        if isinstance(error, ConnectError):
            return ConnectError(f"{self._name} could not be reached")
        if isinstance(error, PeerGone):
            when = "in the middle of its answer" if self._first_event_s else "before it answered"
            return PeerGone(f"{self._name} went away {when}")
        return type(error)(f"{self._name}: {error.message}")


def _one_by_one(events: AsyncIterator[Event]) -> TryNext:
    async def try_next() -> Sequence[Event] | None:
        event = await anext(events, None)
        return None if event is None else (event,)

    return try_next


def _spoken(delta: Delta) -> int:
    """Tokens in ``delta``: as many as the peer says, but no more than there are bytes in it."""
    if 0 <= delta.tokens <= len(delta.text):
        return delta.tokens
    texts = (delta.text, delta.thinking, *(str(call.arguments) for call in delta.tool_calls))
    return min(delta.tokens, sum(len(text.encode(errors="replace")) for text in texts))
