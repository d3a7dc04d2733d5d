"""How vectors that are still missing are asked of another peer, and how its answer becomes the rest of ours.

Rules: only texts without a vector are asked again; the client gets each vector once, under its own number. Which tokens the
peer that went away had counted is not known, so the whole is reckoned from the rest by length. Not here: text
(core.continuation), whom to ask (core.delivery).
"""

from __future__ import annotations

import msgspec

from meshmax.base.inference import EmbedRequest, Event, Finish, Vector


class VectorsSoFar:
    """Which vectors of ``request`` the client has."""

    __slots__ = ("_given", "request")

    def __init__(self, request: EmbedRequest) -> None:
        self.request = request
        self._given: set[int] = set()

    def on_event(self, event: Event) -> None:
        """Take in what the client was sent."""
        if isinstance(event, Vector):
            self._given.add(event.index)

    def missing(self) -> tuple[int, ...]:
        """The numbers of the texts that lack a vector."""
        return tuple(n for n in range(len(self.request.inputs)) if n not in self._given)

    def rest(self) -> EmbedRequest:
        """What to ask another peer."""
        inputs = tuple(self.request.inputs[n] for n in self.missing())
        return msgspec.structs.replace(self.request, inputs=inputs)


class VectorJoint:
    """Turns the next peer's events into those that the client gets."""

    __slots__ = ("_missing", "_share", "_spent_s")

    def __init__(self, so_far: VectorsSoFar, spent_s: float = 0.0) -> None:
        self._missing = so_far.missing()
        inputs = so_far.request.inputs
        asked = sum(len(inputs[n]) for n in self._missing)
        self._share = sum(map(len, inputs)) / asked if asked else 1.0
        self._spent_s = spent_s

    def on_event(self, event: Event) -> list[Event]:
        """What the client gets of it."""
        if isinstance(event, Vector):
            return [Vector(self._missing[event.index], event.values)]
        if isinstance(event, Finish):
            tokens = round(event.prompt_tokens * self._share)
            return [msgspec.structs.replace(event, prompt_tokens=tokens, total_s=event.total_s + self._spent_s)]
        return [event]
