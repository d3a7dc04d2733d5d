"""Which peers hold the beginning of a prompt, since they answered one that began alike: that much need not be read again.

A prompt is cut where turns end (a completion every BLOCK characters), and each cut is known by a hash of all before it, with
how many tokens that is (`marks_of`). Who answered holds every cut of what it was asked, and its own answer after the last one.
Engines give what they hold up in their own time, so what we believe is scaled by the share of earlier beliefs that proved
true at that peer, and ends after HELD_S. Bounded by MAX_CUTS cuts with HOLDERS peers each; what was not used for longest goes
first. Time is passed in. Not here: what that is worth (core.estimate); a model that left memory holds nothing, which the
estimate knows. (vLLM's and SGLang's routers keep such a table too: "prefix-cache-aware routing".)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import ChatRequest, GenerateRequest, InferRequest, Message
from meshmax.core.estimate import BYTES_PER_TOKEN, IMAGE_TOKENS

MAX_CUTS: Final = 8192  # of about 500 bytes: 1000 conversations
HOLDERS: Final = 4  # peers for each; a conversation moves seldom
KEPT_FIRST: Final = 2  # cuts of a prompt that are kept: those that many share (the system prompt),
KEPT_LAST: Final = 6  # and those that the next turn, or another try of this one, begins with
HELD_S: Final = 1800.0  # seconds; engines keep a few prompts, and others' requests push them out
BLOCK: Final = 4096  # characters of a completion's prompt from cut to cut
MAX_MARKS: Final = 256  # cuts of one completion's prompt, so of its first MiB
PICTURE_BYTES: Final = 1024  # of each end of a picture that count; the size does too
WEIGHT: Final = 0.2  # of the newest answer in the share of beliefs that proved true
MIN_BELIEVED: Final = 32  # tokens; the end of a shorter belief says nothing
MAX_SHARES: Final = 4096  # (peer, model) pairs


class Mark(msgspec.Struct, frozen=True):
    """A cut of a prompt. ``tokens``: how many are before it, about. ``is_answer``: what ends here was said by the model."""

    hash: bytes
    tokens: int
    is_answer: bool = False


def marks_of(request: InferRequest) -> tuple[Mark, ...]:
    """The cuts of a prompt, the shortest first; none where nothing is worth keeping."""
    if isinstance(request, ChatRequest):
        return tuple(_turns(request))
    if isinstance(request, GenerateRequest):
        return tuple(_blocks(request))
    return ()


class Prefixes:
    """The table of one node. Every ``now`` is of one monotonic clock, in seconds."""

    __slots__ = ("_cuts", "_shares")

    def __init__(self) -> None:
        self._cuts: OrderedDict[tuple[Sha256, bytes], dict[PeerId, float]] = OrderedDict()  # when each answered
        self._shares: OrderedDict[tuple[PeerId, Sha256], float] = OrderedDict()

    def __len__(self) -> int:
        """How many cuts are kept."""
        return len(self._cuts)

    def held(self, digest: Sha256, marks: Sequence[Mark], now: float) -> dict[PeerId, int]:
        """How many tokens of the prompt with ``marks`` each peer holds, as we believe; who holds none is left out."""
        found: dict[PeerId, int] = {}
        for index in range(len(marks) - 1, -1, -1):
            holders = self._cuts.get((digest, marks[index].hash))
            if holders is None:
                continue
            after = marks[index + 1] if index + 1 < len(marks) else None
            tokens = after.tokens if after and after.is_answer else marks[index].tokens
            for peer, at in holders.items():
                if peer not in found and now - at < HELD_S:
                    found[peer] = int(tokens * self._shares.get((peer, digest), 1.0))
            if len(found) >= HOLDERS:
                break
        return {peer: tokens for peer, tokens in found.items() if tokens > 0}

    def on_answered(
        self, digest: Sha256, marks: Sequence[Mark], peer: PeerId, believed: int, cached: int, now: float
    ) -> None:
        """``peer`` answered the prompt with ``marks``; we had believed that it held so many tokens, and ``cached`` it did."""
        if believed >= MIN_BELIEVED:
            key = (peer, digest)
            share = self._shares.pop(key, 1.0)
            true = min(1.0, max(cached, 0) / believed * share)  # believed was scaled by the share
            self._shares[key] = max(
                share + WEIGHT * (true - share), WEIGHT
            )  # never nothing: it would not be tried again
            if len(self._shares) > MAX_SHARES:
                self._shares.popitem(last=False)
        first = max(KEPT_FIRST, len(marks) - KEPT_LAST)
        for mark in (*marks[:KEPT_FIRST], *marks[first:]):
            holders = self._cuts.setdefault((digest, mark.hash), {})
            self._cuts.move_to_end((digest, mark.hash))
            holders.pop(peer, None)
            holders[peer] = now
            if len(holders) > HOLDERS:
                del holders[next(iter(holders))]
            if len(self._cuts) > MAX_CUTS:
                self._cuts.popitem(last=False)

    def on_lost(self, peer: PeerId) -> None:
        """``peer`` is gone: what it held is."""
        for key in [key for key, holders in self._cuts.items() if holders.pop(peer, None) is not None and not holders]:
            del self._cuts[key]


def _turns(request: ChatRequest) -> Iterator[Mark]:
    state = hashlib.blake2b(_encoded((request.tools, request.think)), digest_size=16)
    size = len(str(request.tools)) if request.tools else 0
    for message in request.messages:
        state.update(_encoded(_without_pictures(message)))
        size += len(message.content) + len(message.thinking) + BYTES_PER_TOKEN * IMAGE_TOKENS * len(message.images)
        yield Mark(state.copy().digest(), size // BYTES_PER_TOKEN, message.role == "assistant")


def _blocks(request: GenerateRequest) -> Iterator[Mark]:
    head = (request.system, request.template, request.raw, request.context, request.suffix)
    state = hashlib.blake2b(_encoded((head, [_picture(image) for image in request.images])), digest_size=16)
    size = len(request.system or "") + len(request.suffix) + BYTES_PER_TOKEN * len(request.context)
    size += BYTES_PER_TOKEN * IMAGE_TOKENS * len(request.images)
    if size:
        yield Mark(state.copy().digest(), size // BYTES_PER_TOKEN)
    for at in range(0, min(len(request.prompt), BLOCK * MAX_MARKS), BLOCK):
        block = request.prompt[at : at + BLOCK]
        state.update(block.encode(errors="replace"))
        yield Mark(state.copy().digest(), (size + at + len(block)) // BYTES_PER_TOKEN)


def _without_pictures(message: Message) -> Any:
    plain = (message.role, message.content, message.tool_calls, message.tool_name)
    return (plain, [_picture(image) for image in message.images])


def _picture(image: bytes) -> tuple[int, bytes, bytes]:
    return len(image), image[:PICTURE_BYTES], image[-PICTURE_BYTES:]


_encoded: Final = msgspec.msgpack.Encoder().encode
