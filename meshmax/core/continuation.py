"""What is asked of the next peer when the one that was answering is gone, and how the two halves become one answer.

Rules: nothing is said twice, nothing is lost, nothing that was sent is contradicted. The next peer goes on right after
what was said ("prefix") where its engine can; where it cannot, and the answer can be expected to come out the same, it is
asked anew ("replay") and only what agrees, character by character, with what was sent is followed by more; an answer whose
tool calls were sent lacks nothing but its end ("finish"). Where none of these holds there is no plan, and the request
fails with its first error. What was said is kept up to MAX_SAID_CHARACTERS; a longer answer cannot be carried on.
Not here: which peer, and when (core.delivery); how an engine goes on (engine.*).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from meshmax.base.errors import EngineError
from meshmax.base.inference import (
    MAX_SAID_CHARACTERS,
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Options,
    Said,
)

MAX_STRADDLE_CHARACTERS: Final = 256  # of a stop word that began before the break; they are some characters long

Mode = Literal["anew", "prefix", "replay", "finish"]

CONTRADICTED: Final = (
    "the peer that was answering went away, and another one answered differently from what was sent already"
)


class SoFar:
    """What the client has of an answer. Give it every event that goes to the client."""

    __slots__ = ("_size", "_text", "_thinking", "calls", "full", "logprobs", "tokens")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._size = 0
        self.tokens = 0
        self.logprobs = 0  # entries
        self.calls = 0  # of tools; what they are is not needed to go on
        self.full = False  # more was said than is kept

    def on_event(self, event: Event) -> None:
        """Take in what the client was sent."""
        if not isinstance(event, Delta):
            return
        self.tokens += event.tokens
        self.logprobs += len(event.logprobs)
        self.calls += len(event.tool_calls)
        if self.full:
            return
        if event.text:
            self._text.append(event.text)
        if event.thinking:
            self._thinking.append(event.thinking)
        self._size += len(event.text) + len(event.thinking)
        if self._size > MAX_SAID_CHARACTERS:
            self.full = True
            self._text, self._thinking = [], []

    @property
    def text(self) -> str:
        """The answer as far as it was sent."""
        return _joined(self._text)

    @property
    def thinking(self) -> str:
        """The thoughts as far as they were sent."""
        return _joined(self._thinking)

    @property
    def silent(self) -> bool:
        """Whether nothing was sent."""
        return not (self._size or self.calls)


def _joined(parts: list[str]) -> str:
    if len(parts) > 1:
        parts[:] = ["".join(parts)]
    return parts[0] if parts else ""


class Plan(msgspec.Struct, frozen=True):
    """How to go on. ``request`` is what to ask the next peer; with "finish" nobody is asked, and Joint.end() is the end.

    ``exact``: what follows is what the peer before would have said, as far as can be told.
    """

    mode: Mode
    request: InferRequest
    exact: bool


def plan(request: InferRequest, so_far: SoFar, *, deterministic: bool = False, can_go_on: bool = True) -> Plan | None:
    """How to go on with ``request`` after ``so_far``; None: it cannot be done.

    ``deterministic``: the engine says the same to the same request whatever its options (echo). ``can_go_on`` False: the
    next peer's engine said CapabilityMissing to a "prefix".
    """
    if so_far.calls:
        return Plan("finish", request, exact=True)
    if so_far.silent:
        return Plan("anew", request, exact=True)
    if so_far.full or isinstance(request, EmbedRequest):
        return None
    exact = deterministic or _comes_out_the_same(request)
    if can_go_on:
        said = Said(so_far.text, so_far.thinking, so_far.tokens)
        return Plan("prefix", msgspec.structs.replace(request, said=said), exact)
    if deterministic or is_greedy(request.options) or (request.options.seed is not None and request.options.seed >= 0):
        return Plan("replay", request, exact=True)
    return None


def _comes_out_the_same(request: GenerateRequest | ChatRequest) -> bool:
    """Whether an engine that goes on in the middle may be expected to say what it would have said from the start.

    A form makes it choose tokens as no text is split into by itself. Infilling has no place for what was said but the end
    of what stands before the gap.
    """
    infills = isinstance(request, GenerateRequest) and bool(request.suffix)
    return is_greedy(request.options) and request.format is None and not infills


def is_greedy(options: Options) -> bool:
    """Whether the likeliest token is taken each time, so that there is nothing to draw."""
    return options.temperature == 0 or options.top_k == 1


class Joint:
    """Turns the next peer's events into those that the client gets.

    ``spent_s``: from the first token to the break, added to the times of the Finish.
    """

    __slots__ = ("_check", "_so_far_tokens", "_spent_s", "_spoke", "_stop", "_tokens")

    def __init__(self, plan: Plan, so_far: SoFar, spent_s: float = 0.0) -> None:
        self._check = _Replayed(so_far) if plan.mode == "replay" else None
        self._so_far_tokens = so_far.tokens
        self._tokens = so_far.tokens if plan.mode == "prefix" else 0  # those that the Finish does not know of
        self._spent_s = spent_s
        self._spoke = bool(so_far.text)
        stop = () if plan.mode != "prefix" or isinstance(plan.request, EmbedRequest) else plan.request.options.stop
        self._stop = _begun_stop(stop or (), so_far.text)

    def on_event(self, event: Event) -> list[Event]:
        """What the client gets of it; after a Finish the answer is whole, whatever else comes.

        Raises EngineError for an answer that contradicts what was said.
        """
        if isinstance(event, Finish):
            held = self._stop.release() if self._stop else []
            if self._check is not None:
                self._check.end()
            return [*held, self._finished(event)]
        if not isinstance(event, Delta):
            return [event]
        if self._check is not None:
            fresh = self._check.fresh(event)
            return [] if fresh is None else [fresh]
        if event.thinking and self._spoke:
            raise EngineError(CONTRADICTED)
        return [event] if self._stop is None else self._after_begun_stop(self._stop, event)

    def end(self) -> Finish:
        """The end of an answer that lacks nothing else ("finish"); the tokens of the prompt are not known any more."""
        return Finish("stop", output_tokens=self._so_far_tokens, total_s=self._spent_s, output_s=self._spent_s)

    def _after_begun_stop(self, stop: _BegunStop, event: Delta) -> list[Event]:
        out = stop.on_delta(event)
        if stop.complete:
            return [self._finished(Finish("stop", output_tokens=stop.tokens))]
        if out:
            self._stop = None
        return out

    def _finished(self, finish: Finish) -> Finish:
        return msgspec.structs.replace(
            finish,
            output_tokens=finish.output_tokens + self._tokens,
            output_s=finish.output_s + self._spent_s,
            total_s=finish.total_s + self._spent_s,
        )


class _Replayed:
    """Checks off what was said against the new answer."""

    __slots__ = ("_logprobs", "_spoke", "_text", "_thinking", "_tokens")

    def __init__(self, so_far: SoFar) -> None:
        self._text, self._thinking = so_far.text, so_far.thinking  # still to be heard again
        self._logprobs, self._tokens = so_far.logprobs, so_far.tokens
        self._spoke = bool(so_far.text)

    def fresh(self, event: Delta) -> Delta | None:
        """What of ``event`` was not said yet. Raises EngineError for a contradiction."""
        thinking, self._thinking = _after(self._thinking, event.thinking)
        if (thinking and self._spoke) or (event.text and self._thinking):
            raise EngineError(CONTRADICTED)
        text, self._text = _after(self._text, event.text)
        if event.tool_calls:
            self.end()
        logprobs = event.logprobs[self._logprobs :]
        self._logprobs = max(0, self._logprobs - len(event.logprobs))
        counted = min(self._tokens, event.tokens)
        self._tokens -= counted
        if not (thinking or text or event.tool_calls):
            return None
        tokens = event.tokens - counted
        return msgspec.structs.replace(event, text=text, thinking=thinking, logprobs=logprobs, tokens=tokens)

    def end(self) -> None:
        """Nothing more of this kind will come. Raises EngineError where something was said that was not heard again."""
        if self._text or self._thinking:
            raise EngineError(CONTRADICTED)


def _after(expected: str, heard: str) -> tuple[str, str]:
    """What of ``heard`` is new, and what of ``expected`` is still to be heard. Raises EngineError where they differ."""
    common = min(len(expected), len(heard))
    if expected[:common] != heard[:common]:
        raise EngineError(CONTRADICTED)
    return heard[common:], expected[common:]


class _BegunStop:
    """A stop word that may have begun before the break, of which the next engine knows only the rest.

    Engines hold such beginnings back, so this is for those that do not. Holds deltas until the word is there or cannot be.
    """

    __slots__ = ("_held", "_rests", "_text", "complete", "tokens")

    def __init__(self, rests: list[str]) -> None:
        self._rests = rests
        self._held: list[Event] = []
        self._text = ""
        self.tokens = 0
        self.complete = False

    def on_delta(self, event: Delta) -> list[Event]:
        """What need not be held any more."""
        self._held.append(event)
        self._text += event.text
        self.tokens += event.tokens
        self.complete = any(self._text.startswith(rest) for rest in self._rests)
        self._rests = [rest for rest in self._rests if rest.startswith(self._text)]
        return [] if self.complete or (self._rests and not event.tool_calls) else self.release()

    def release(self) -> list[Event]:
        """All that is held."""
        held, self._held = self._held, []
        return held


def _begun_stop(stop: tuple[str, ...], said: str) -> _BegunStop | None:
    rests = [
        word[length:]
        for word in stop
        for length in range(1, min(len(word), MAX_STRADDLE_CHARACTERS))
        if said.endswith(word[:length])
    ]
    return _BegunStop(rests) if rests else None


def up_to_the_end(events: Iterable[Event]) -> list[Event]:
    """``events``, none of them after a Finish."""
    found: list[Event] = []
    for event in events:
        found.append(event)
        if isinstance(event, Finish):
            break
    return found
