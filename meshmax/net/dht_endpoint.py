"""Where DHT datagrams leave and arrive: signing, matching answers to questions, and refusing before anything is spent.

An arriving datagram passes these doors in this order: length and header; receiver; for an answer, that it was asked for, of
this node at this address; for a question, its body, the rates of its source, and of all who have proven their addresses or of
all others; the signature; for a question, its time, that it was not seen before, and its overlay. What passes is handled at
once, in this task, within about a millisecond; nothing is queued and no task is started for it. The kademlia package starts one
or two tasks for each datagram and trusts its content; none of its datagram code runs here.
Not here: what is answered (net.dht_protocol).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import public_key_of
from meshmax.core.arrivals import Arrivals
from meshmax.core.subnets import source_of
from meshmax.ports import Datagrams, Signer
from meshmax.wire.dht import (
    FIRST_BYTES,
    NOBODY,
    REQUEST_BYTES,
    Answer,
    Body,
    Contact,
    Envelope,
    Find,
    Ping,
    Question,
    Store,
    Verify,
    decode_body,
    decode_header,
    encode_datagram,
    node_id_of,
    verified,
    verify_ed25519,
)

CLOCK_TOLERANCE_S: Final = 300.0  # between honest clocks
MAX_PENDING: Final = 512  # questions without an answer yet
MAX_SEEN: Final = 8192  # questions remembered against replays; at the usual rates more than CLOCK_TOLERANCE_S of them
TIMEOUT_S: Final = 2.0  # for an answer; round trips around the world take 0.4
SKEWED_SENDERS: Final = 3  # distinct ones whose clocks disagree with ours before we doubt ours


class Overlay(Protocol):
    """One DHT among those that share the port."""

    def proves(self, body: Question, sender: Contact) -> bool:
        """Whether ``body`` holds what was sent to this sender's address before. Cheap: nothing is verified yet."""
        ...

    def question(self, body: Question, envelope: Envelope, sender: Contact) -> Answer | None:
        """What to answer; None: nothing."""
        ...


class Pending:
    """A question that is out. ``answered`` is set with ``body`` and ``envelope``, or never."""

    __slots__ = ("address", "answered", "body", "envelope", "overlay", "public_key")

    def __init__(self, overlay: bytes, address: tuple[str, int], public_key: bytes | None) -> None:
        self.overlay, self.address, self.public_key = overlay, address, public_key
        self.answered = trio.Event()
        self.body: Answer | None = None
        self.envelope: Envelope | None = None

    async def wait(self, at_most_s: float) -> None:
        """Until it is answered, or so long."""
        with trio.move_on_after(max(0.0, at_most_s)):
            await self.answered.wait()


class Endpoint:
    """One node's end of the DHT. ``random``: has randbytes; ``client`` says whether nobody can reach us unasked."""

    def __init__(
        self,
        signer: Signer,
        datagrams: Datagrams,
        *,
        random: Any,
        unix_now: Callable[[], float],
        client: Callable[[], bool] = lambda: False,
        verify: Verify = verify_ed25519,
        scale: float = 1.0,
    ) -> None:
        self.public_key = public_key_of(signer.peer_id)
        self.node_id = node_id_of(self.public_key)
        self._sign, self._datagrams, self._random, self._unix_now = signer.sign, datagrams, random, unix_now
        self.client, self.verify = client, verify
        self._overlays: dict[bytes, Overlay] = {}
        self._adopt: Callable[[bytes, str], Overlay | None] = lambda _tag, _source: None
        self._pending: dict[bytes, Pending] = {}
        self._seen: dict[bytes, None] = {}
        self._arrivals = Arrivals(trio.current_time(), scale)
        self._skewed: dict[bytes, float] = {}
        self.counts: Counter[str] = Counter()
        self._open = True
        datagrams.receive(FIRST_BYTES, self._arrived)

    def attach(self, tag: bytes, overlay: Overlay) -> None:
        """Serve the overlay of that tag."""
        self._overlays[tag] = overlay

    def detach(self, tag: bytes) -> None:
        """Serve it no longer."""
        self._overlays.pop(tag, None)

    def adopt_with(self, adopt: Callable[[bytes, str], Overlay | None]) -> None:
        """Ask ``adopt`` (tag, source) for the overlay of a tag that is not known."""
        self._adopt = adopt

    def close(self) -> None:
        """Hear and say nothing any more: the port goes on, for others."""
        self._open = False

    @property
    def skew_s(self) -> float:
        """How far our clock is behind that of the others, if several agree that it is; else 0."""
        if len(self._skewed) < SKEWED_SENDERS:
            return 0.0
        skews = sorted(self._skewed.values())
        return skews[len(skews) // 2]

    async def ask(
        self,
        tag: bytes,
        to: tuple[str, int],
        public_key: bytes | None,
        body: Question,
        on_slow: Callable[[], None] | None = None,
        slow_s: float = TIMEOUT_S,
    ) -> Pending | None:
        """The answer to a question, or None, also when too many are out. ``on_slow`` is called once after ``slow_s`` without."""
        if len(self._pending) >= MAX_PENDING:
            await trio.lowlevel.checkpoint()
            return None
        request = self._random.randbytes(REQUEST_BYTES)
        pending = self._pending[request] = Pending(tag, to, public_key)
        try:
            receiver = node_id_of(public_key) if public_key else NOBODY
            self._send(tag, receiver, request, body, to)
            await pending.wait(slow_s if on_slow else TIMEOUT_S)
            if on_slow is not None and pending.body is None:
                on_slow()
                await pending.wait(TIMEOUT_S - slow_s)
            return pending if pending.body is not None else None
        finally:
            del self._pending[request]

    def _send(self, tag: bytes, receiver: bytes, request: bytes, body: Body, to: tuple[str, int]) -> None:
        now_ms = int(self._unix_now() * 1000)
        data = encode_datagram(tag, self.public_key, receiver, now_ms, request, self.client(), body, self._sign)
        self.counts["sent"] += 1
        self.counts["sent_bytes"] += len(data)
        self._datagrams.send(data, to)

    def _arrived(self, data: bytes, sender: tuple[str, int]) -> None:
        if not self._open:
            return
        try:
            refused = self._take(decode_header(data), sender)
        except RemoteProtocolError:
            refused = "malformed"
        self.counts[refused or "taken"] += 1

    def _take(self, envelope: Envelope, sender: tuple[str, int]) -> str:
        """Why the datagram was refused, '' if it was not. Raises RemoteProtocolError."""
        if envelope.sender == self.public_key or envelope.receiver not in (self.node_id, NOBODY):
            return "misdirected"
        if envelope.answer:
            return self._take_answer(envelope, sender) if envelope.receiver == self.node_id else "misdirected"
        body = decode_body(envelope)
        if not isinstance(body, (Ping, Find, Store)) or (envelope.receiver == NOBODY and not isinstance(body, Ping)):
            return "malformed"
        overlay, contact = self._overlays.get(envelope.overlay), Contact(envelope.sender, *sender)
        proven = overlay is not None and overlay.proves(body, contact)
        if not self._arrivals.take(source_of(sender[0]), trio.current_time(), proven=proven):
            return "throttled"
        skew_s = envelope.time_ms / 1000 - self._unix_now()
        if not verified(envelope, self.verify):
            return "forged"
        self._note_skew(envelope.sender, skew_s)
        if abs(skew_s) > CLOCK_TOLERANCE_S:
            return "untimely"
        if not self._is_new(envelope):
            return "replayed"
        overlay = overlay or self._adopt(envelope.overlay, source_of(sender[0]))
        if overlay is None:
            return "foreign"
        answer = overlay.question(body, envelope, contact)
        if answer is not None:
            self._send(envelope.overlay, node_id_of(envelope.sender), envelope.request, answer, sender)
        return ""

    def _take_answer(self, envelope: Envelope, sender: tuple[str, int]) -> str:
        pending = self._pending.get(envelope.request)
        if (
            pending is None
            or pending.answered.is_set()
            or (pending.address, pending.overlay) != (sender, envelope.overlay)
            or pending.public_key not in (None, envelope.sender)
        ):
            return "unasked"
        if not verified(envelope, self.verify):
            return "forged"
        body = decode_body(envelope)
        if not isinstance(body, (Ping, Find, Store)):
            pending.body, pending.envelope = body, envelope
            pending.answered.set()
        return ""

    def _note_skew(self, public_key: bytes, skew_s: float) -> None:
        self._skewed.pop(public_key, None)
        if abs(skew_s) > CLOCK_TOLERANCE_S:
            self._skewed[public_key] = skew_s
            if len(self._skewed) > 2 * SKEWED_SENDERS:
                del self._skewed[next(iter(self._skewed))]
        elif self._skewed:  # somebody agrees with our clock: then those who do not are wrong
            self._skewed.clear()

    def _is_new(self, envelope: Envelope) -> bool:
        mark = envelope.sender[:16] + envelope.request
        if mark in self._seen:
            return False
        self._seen[mark] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return True
