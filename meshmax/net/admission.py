"""The gate behind the handshake: who is a member, who a guest, and which stream may be answered on which connection.

Rules. The dialling side asks for admission on the protocol MEMBER before anything else; a connection becomes a member's when
both sides agree, and only then does the adapter tell of it. Streams of protocols for members wait up to
ADMISSION_TIMEOUT_S for that. An incoming connection on which nobody asked for so long, or before the first stream of a
protocol that is served to "anyone", is a guest's: it may use such protocols, and is cut after GUEST_IDLE_S without a
stream. Connections that wait, and guests, are bounded; where there is no room the oldest of the address that has most makes
way, an idle one first. A refused side has REFUSED_LINGER_S to read why. Without an Admission everybody is a member at once.
Shared by the real swarm and the one in memory. Not here: what makes a member (ports.Admission), streams and sockets (the swarms).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import trio

from meshmax.base.errors import (
    Busy,
    ConnectError,
    MeshmaxError,
    NotAMember,
    PeerGone,
    RemoteProtocolError,
    VersionMismatch,
)
from meshmax.base.ids import PeerId
from meshmax.core.subnets import source_of
from meshmax.net import limits
from meshmax.ports import Admission, Stream
from meshmax.telemetry.log import get_logger
from meshmax.wire.failure import Failure, failure_of
from meshmax.wire.frames import Codec
from meshmax.wire.protocols import MEMBER

_log = get_logger("admission")
_FAILURE: Final[Codec[Failure]] = Codec(Failure)

_LOOK_S: Final = 0.001  # between looks at whether a guest is idle, at least

State = Literal["waiting", "member", "guest", "refused", "over"]
Answer = Callable[[Stream], Awaitable[None]]


class Passage:
    """How far one connection has come. ``origin``: the remote's subnet (core.subnets), by which crowds are told."""

    def __init__(
        self,
        peer_id: PeerId,
        origin: str,
        direction: Literal["in", "out"],
        welcome: Callable[[], None],
        cut: Callable[[], None],
    ) -> None:
        """``welcome`` is called once when it becomes a member's; ``cut`` ends it now, which calls `Gate.over`."""
        self.peer_id, self.origin, self.direction = peer_id, source_of(origin), direction
        self.welcome, self.cut = welcome, cut
        self.state: State = "waiting"
        self.settled = trio.Event()  # no longer waiting
        self.ended = trio.Event()
        self.why = ""  # it was refused
        self.asked = False  # the dialling side has opened MEMBER
        self.streams = 0  # of the peer, open now
        self.our_streams = 0  # to the peer, open now
        self.idle_since = trio.current_time()


class Gate:
    """The passages of one swarm. Its tasks run in the swarm's ``nursery``."""

    def __init__(self, nursery: trio.Nursery, admission: Admission | None, max_guests: int = limits.MAX_GUESTS) -> None:
        self._nursery, self._admission = nursery, admission
        self._waiting, self._guests = _Crowd(limits.MAX_ADMISSIONS), _Crowd(max_guests)
        self._told = _Told()

    @property
    def checks(self) -> bool:
        """Whether there is an Admission, so that not everybody is a member."""
        return self._admission is not None

    # --- connections -------------------------------------------------------------------------------------------------

    def open(self, passage: Passage, *, guest: bool = False) -> None:
        """A connection stands. An outgoing one that is no guest's is to be followed by `ask`."""
        if guest:
            passage.state = "guest"
            passage.settled.set()
        elif self._admission is None:
            self._welcome(passage)
        elif passage.direction == "in":
            self._waiting.add(passage)
            self._nursery.start_soon(self._attend, passage)

    def over(self, passage: Passage) -> None:
        """The connection has ended; idempotent."""
        passage.state = "over"
        passage.settled.set()
        passage.ended.set()
        passage.welcome = passage.cut = _nothing  # they know the link, which knows the passage
        self._waiting.discard(passage)
        self._guests.discard(passage)

    async def ask(self, passage: Passage, open_member: Callable[[], Awaitable[Stream]]) -> None:
        """The dialling side's part. Raises NotAMember, ConnectError; the connection is then cut, also when cancelled."""
        if self._admission is None or passage.state != "waiting":
            return
        try:
            with trio.fail_after(limits.ADMISSION_TIMEOUT_S):
                await self._ask_over(await open_member(), self._admission, passage)
        except trio.TooSlowError:
            raise ConnectError(
                f"the peer did not say within {limits.ADMISSION_TIMEOUT_S:g} s which mesh it is in"
            ) from None
        except VersionMismatch:
            why = "it does not say which mesh it is in: another program, or a version without meshes"
            self._refuse(passage, why)
            raise NotAMember(why) from None
        except NotAMember as error:
            self._refuse(passage, error.message)
            raise
        except (ConnectError, Busy):
            raise
        except MeshmaxError as error:
            raise ConnectError(f"the admission failed: {error.message}") from error
        finally:
            if passage.state not in ("member", "refused"):
                passage.cut()

    async def wait_asked(self, passage: Passage, *, guest: bool = False) -> None:
        """The accepting side's part, for who wants to know how it ends; ``guest``: a guest's connection is right, too.

        Raises NotAMember, ConnectError; the connection is then cut, also when cancelled.
        """
        try:
            await passage.settled.wait()
        finally:
            fine = ("member", "refused", "guest") if guest else ("member", "refused")
            state = passage.state
            if state not in fine:
                passage.cut()
        if state == "refused":
            raise NotAMember(passage.why)
        if state == "over":
            raise ConnectError("the connection was lost during the admission")
        if state not in fine:
            raise ConnectError("the peer did not ask to be admitted")

    async def _ask_over(self, stream: Stream, admission: Admission, passage: Passage) -> None:
        """Closed in order after it and after a refusal, which is still to be read; else the stream is reset."""
        try:
            await admission.admit(stream, "out")
            if passage.state != "waiting":
                raise ConnectError("the connection was lost during the admission")
            self._welcome(passage)  # at once: what was settled just now is true for no longer
        except NotAMember:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise
        await stream.aclose()

    async def _answer_member(self, passage: Passage, admission: Admission, stream: Stream) -> None:
        """The accepting side's part."""
        if passage.asked:
            raise RemoteProtocolError("the peer asks for admission twice on one connection")
        passage.asked = True
        try:
            with trio.fail_after(limits.ADMISSION_TIMEOUT_S):
                await admission.admit(stream, "in")
            if passage.state in ("waiting", "guest"):
                self._welcome(passage)
        except trio.TooSlowError:
            self._tell(passage, "it began the admission and did not go on")
        except NotAMember as error:
            await stream.aclose()
            self._refuse(passage, error.message)
        finally:
            if passage.state not in ("member", "refused"):
                passage.cut()

    def _welcome(self, passage: Passage) -> None:
        passage.state = "member"
        self._waiting.discard(passage)
        self._guests.discard(passage)
        passage.welcome()
        passage.settled.set()

    def _refuse(self, passage: Passage, why: str) -> None:
        """Tell people, and cut the connection once the other side had time to read why."""
        self._tell(passage, why)
        if passage.state != "over":
            passage.state, passage.why = "refused", why
            passage.settled.set()
            self._nursery.start_soon(self._linger, passage)

    async def _linger(self, passage: Passage) -> None:
        with trio.move_on_after(limits.REFUSED_LINGER_S):
            await passage.ended.wait()
        passage.cut()

    def _tell(self, passage: Passage, why: str) -> None:
        log = _log.info if self._told.first(passage.peer_id, why, trio.current_time()) else _log.debug
        log("peer not admitted", peer=passage.peer_id, direction=passage.direction, why=why)

    async def _attend(self, passage: Passage) -> None:
        """See an incoming connection through until it is a member's or over."""
        with trio.move_on_after(limits.ADMISSION_TIMEOUT_S):
            await passage.settled.wait()
        self._let_in_as_guest(passage)
        while passage.state == "guest":
            busy = passage.streams or passage.our_streams
            idle_s = 0.0 if busy else trio.current_time() - passage.idle_since
            if idle_s >= limits.GUEST_IDLE_S:
                passage.cut()
            # A remainder that floats cannot add to a simulated clock would be waited for for ever.
            with trio.move_on_after(max(limits.GUEST_IDLE_S - idle_s, _LOOK_S)):
                await passage.ended.wait()

    def _let_in_as_guest(self, passage: Passage) -> None:
        if passage.state == "waiting" and passage.direction == "in" and not passage.asked:
            self._waiting.discard(passage)
            passage.state = "guest"
            self._guests.add(passage)
            passage.settled.set()

    # --- streams -----------------------------------------------------------------------------------------------------

    def using(self, passage: Passage, streams: int) -> None:
        """We have opened (1) or closed (-1) a stream to the peer: a connection that we use is not idle."""
        passage.our_streams += streams
        passage.idle_since = trio.current_time()

    def stream_opened(self, passage: Passage) -> bool:
        """The peer opens a stream; whether it may have one more. Followed by `stream_closed`."""
        passage.streams += 1
        return passage.state == "member" or passage.streams <= limits.MAX_GUEST_STREAMS

    def stream_closed(self, passage: Passage) -> None:
        """A stream of the peer is closed."""
        passage.streams -= 1
        passage.idle_since = trio.current_time()

    async def serve(
        self, passage: Passage, stream: Stream, protocol: str, to: Literal["members", "anyone"], answer: Answer
    ) -> None:
        """Run ``answer`` if the peer may use ``protocol``; else say why not, as the answer to whatever it asks."""
        if self._admission is not None and protocol == MEMBER and passage.state != "member":
            await self._answer_member(passage, self._admission, stream)
            return
        if to == "anyone" and self._admission is not None:
            self._let_in_as_guest(passage)  # who wants to be a member asks for that first
        lacking = await self._lacking(passage, protocol) if to == "members" else None
        if lacking is None:
            await answer(stream)
            return
        await stream.send_all(_FAILURE.encode(failure_of(lacking)))
        await stream.aclose()
        raise lacking

    async def _lacking(self, passage: Passage, protocol: str) -> MeshmaxError | None:
        """Why the peer may not use ``protocol``, once it is known who it is."""
        if self._admission is None:
            return None
        if not passage.settled.is_set():
            with trio.move_on_after(limits.ADMISSION_TIMEOUT_S):
                await passage.settled.wait()
        if passage.state == "over":
            return PeerGone("the connection was lost during the admission")
        if passage.state != "member":
            return NotAMember("this is for members of this peer's mesh only")
        try:
            self._admission.check(passage.peer_id, protocol)
        except MeshmaxError as error:
            return error
        return None


class _Crowd:
    """A bounded set of passages; where there is no room one of the most crowded origin makes way."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._members: dict[Passage, None] = {}  # oldest first
        self._per_origin: Counter[str] = Counter()

    def add(self, passage: Passage) -> None:
        if len(self._members) >= self._most:
            crowd = max(self._per_origin, key=lambda origin: self._per_origin[origin])
            candidates = [member for member in self._members if member.origin == crowd]
            victim = min(candidates, key=lambda member: bool(member.streams))
            self.discard(victim)
            victim.cut()
        self._members[passage] = None
        self._per_origin[passage.origin] += 1

    def discard(self, passage: Passage) -> None:
        if passage in self._members:
            del self._members[passage]
            self._per_origin[passage.origin] -= 1
            if not self._per_origin[passage.origin]:
                del self._per_origin[passage.origin]


class _Told:
    """Which refusals people have been told of, so that a peer that comes again and again fills no log."""

    REMEMBERED: Final = 256  # peers and reasons
    LINES: Final = 20  # in one WINDOW_S; a flood of identities is one news
    WINDOW_S: Final = 60.0

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[PeerId, str], None] = OrderedDict()
        self._opened_s, self._lines = -math.inf, 0

    def first(self, peer_id: PeerId, why: str, now: float) -> bool:
        known = (peer_id, why) in self._seen
        self._seen[(peer_id, why)] = None
        self._seen.move_to_end((peer_id, why))
        if len(self._seen) > self.REMEMBERED:
            self._seen.popitem(last=False)
        if now - self._opened_s >= self.WINDOW_S:
            self._opened_s, self._lines = now, 0
        self._lines += not known
        return not known and self._lines <= self.LINES


def _nothing() -> None:
    """The connection has ended already."""


async def nothing_more(stream: Stream) -> None:
    """What MEMBER answers to members unless somebody serves it."""
    await trio.lowlevel.checkpoint()
    raise RemoteProtocolError(f"the peer {stream.peer} is admitted already")
