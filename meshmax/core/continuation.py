"""What is asked of the next peer when the one that was answering is gone, and how the two halves become one answer.

Rules: nothing is said twice, nothing is lost, nothing that was sent is contradicted. The next peer goes on right after
what was said ("prefix") where its engine can; where it cannot, and the answer can be expected to come out the same, it is
asked anew ("replay") and only what agrees, character by character, with what was sent is followed by more; an answer whose
tool calls were sent lacks nothing but its end ("finish"). Where none of these holds there is no plan, and the request
fails with its first error. What was said is kept up to MAX_SAID_CHARACTERS; a longer answer cannot be carried on.
Not here: which peer, and when (core.delivery); how an engine goes on (engine.*).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.errors import EngineError
from meshmax.base.inference import (
    MAX_SAID_CHARACTERS,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    InferRequest,
    Options,
    Said,
    ToolCall,
)

Mode = Literal["anew", "prefix", "replay", "finish"]

CONTRADICTED: Final = (
    "the peer that was answering went away, and another one answered differently from what was sent already: ask again"
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
        self.calls: tuple[ToolCall, ...] = ()
        self.full = False  # more was said than is kept

    def on_event(self, event: Event) -> None:
        """Take in what the client was sent."""
        if not isinstance(event, Delta):
            return
        self.tokens += event.tokens
        self.logprobs += len(event.logprobs)
        self.calls += event.tool_calls
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
    exact = deterministic or is_greedy(request.options)
    if can_go_on:
        said = Said(so_far.text, so_far.thinking, so_far.tokens)
        return Plan("prefix", msgspec.structs.replace(request, said=said), exact)
    if exact or (request.options.seed is not None and request.options.seed >= 0):
        return Plan("replay", request, exact=True)
    return None


def is_greedy(options: Options) -> bool:
    """Whether the likeliest token is taken each time, so that there is nothing to draw."""
    return options.temperature == 0 or options.top_k == 1


class Joint:
    """Turns the next peer's events into those that the client gets.

    ``spent_s``: from the first token to the break, added to the times of the Finish.
    """

    def __init__(self, plan: Plan, so_far: SoFar, spent_s: float = 0.0) -> None:
        self._mode = plan.mode
        self._said_tokens = so_far.tokens if plan.mode == "prefix" else 0
        self._spent_s = spent_s
        replayed = plan.mode == "replay"
        self._text = so_far.text if replayed else ""  # still to be heard again
        self._thinking = so_far.thinking if replayed else ""
        self._logprobs = so_far.logprobs if replayed else 0
        self._spoke = bool(so_far.text)
        self._so_far = so_far

    def on_event(self, event: Event) -> list[Event]:
        """What the client gets of it; after a Finish the answer is whole. Raises EngineError for a contradiction."""
        if isinstance(event, Delta):
            delta = self._fresh(event)
            return [] if delta is None else [delta]
        if isinstance(event, Finish):
            return [self._finished(event)]
        return [event]

    def end(self) -> Finish:
        """The end of an answer that lacks nothing else ("finish"); the tokens of the prompt are not known any more."""
        return Finish("stop", output_tokens=self._so_far.tokens, total_s=self._spent_s, output_s=self._spent_s)

    def _fresh(self, event: Delta) -> Delta | None:
        if not (self._text or self._thinking):
            if event.thinking and self._spoke:
                raise EngineError(CONTRADICTED)
            return event
        thinking = self._heard_thinking(event.thinking)
        text = self._heard_text(event.text)
        if event.tool_calls and (self._text or self._thinking):
            raise EngineError(CONTRADICTED)
        logprobs = event.logprobs[self._logprobs :]
        self._logprobs = max(0, self._logprobs - len(event.logprobs))
        if not (thinking or text or event.tool_calls):
            return None
        return msgspec.structs.replace(event, text=text, thinking=thinking, logprobs=logprobs)

    def _heard_thinking(self, heard: str) -> str:
        rest, self._thinking = _after(self._thinking, heard)
        if rest and self._spoke:
            raise EngineError(CONTRADICTED)
        return rest

    def _heard_text(self, heard: str) -> str:
        if heard and self._thinking:
            raise EngineError(CONTRADICTED)
        rest, self._text = _after(self._text, heard)
        return rest

    def _finished(self, finish: Finish) -> Finish:
        if self._text or self._thinking:
            raise EngineError(CONTRADICTED)
        return msgspec.structs.replace(
            finish,
            output_tokens=finish.output_tokens + self._said_tokens,
            output_s=finish.output_s + self._spent_s,
            total_s=finish.total_s + self._spent_s,
        )


def _after(expected: str, heard: str) -> tuple[str, str]:
    """What of ``heard`` is new, and what of ``expected`` is still to be heard. Raises EngineError where they differ."""
    common = min(len(expected), len(heard))
    if expected[:common] != heard[:common]:
        raise EngineError(CONTRADICTED)
    return heard[common:], expected[common:]
