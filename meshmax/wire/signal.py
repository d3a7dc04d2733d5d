"""Messages of ``/meshmax/signal/1.0.0``: two peers agree on one attempt at a better path between them.

One stream is one attempt; who opens it leads. Lead: Offer, then Go; other: Answer or Decline; both: Trickle and Done at any
time. Each message names its attempt, so that what is late means nothing. They travel inside a connection between the two,
over a relay or not, so that nobody else reads or writes them. Decided here: bounds. Not here: what is done with them
(core.attempt), which candidates are believed (core.candidates).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from meshmax.base.model import Signed
from meshmax.base.traversal import Candidate, Purpose
from meshmax.base.units import KIB
from meshmax.wire.frames import Codec

ATTEMPT_ID_BYTES: Final = 16
MAX_CANDIDATES: Final = 16  # of TCP a message: each address of a machine with many interfaces, and the mapped one
MAX_SDP: Final = 8 * KIB  # characters; a data channel's with ten candidates has about 2,500
MAX_VOUCHERS: Final = 8  # each has about 250 bytes
MAX_PREPARED_S: Final = 10.0  # no preparation takes longer; the round trip is found with it
_MAX_BODY_BYTES: Final = 24 * KIB

AttemptId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=ATTEMPT_ID_BYTES, max_length=ATTEMPT_ID_BYTES)]
_Candidates: TypeAlias = Annotated[tuple[Candidate, ...], msgspec.Meta(max_length=MAX_CANDIDATES)]
_Sdp: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_SDP)]
_Vouchers: TypeAlias = Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_VOUCHERS)]

# "glare": an offer of the decliner's own counts; "restart": its network changed, another attempt has other candidates;
# "withdrawn": it is wanted no more.
DeclineReason = Literal["busy", "glare", "not-offered", "restart", "withdrawn"]


class Offer(msgspec.Struct, frozen=True, omit_defaults=True, tag="offer"):
    """Lead: come and meet me.

    ``candidates``: of TCP. ``udp``: an SDP of ours is here, or will be trickled. ``turn``: relayed by TURN servers, no TCP.
    ``vouchers``: what observers say of our addresses.
    """

    attempt: AttemptId
    purpose: Purpose = "control"
    candidates: _Candidates = ()
    udp: bool = False
    sdp: _Sdp = ""
    turn: bool = False
    vouchers: _Vouchers = ()


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, tag="answer"):
    """Other: where I am. ``prepared_s``: how long I took from your Offer to this; ``udp`` as in Offer."""

    attempt: AttemptId
    prepared_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_PREPARED_S)]
    candidates: _Candidates = ()
    udp: bool = False
    sdp: _Sdp = ""
    vouchers: _Vouchers = ()


class Go(msgspec.Struct, frozen=True, tag="go"):
    """Lead: start with TCP now."""

    attempt: AttemptId


class Trickle(msgspec.Struct, frozen=True, omit_defaults=True, tag="trickle"):
    """Either: what was not ready before. Candidates count until TCP started, an SDP once."""

    attempt: AttemptId
    candidates: _Candidates = ()
    sdp: _Sdp = ""


class Decline(msgspec.Struct, frozen=True, omit_defaults=True, tag="decline"):
    """Either: this attempt ends here. ``retry_after_s`` with "busy"."""

    attempt: AttemptId
    reason: DeclineReason
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Lead: a path was made, or every method failed."""

    attempt: AttemptId
    made: bool


Message: TypeAlias = Offer | Answer | Go | Trickle | Decline | Done

MESSAGES: Final[Codec[Message]] = Codec(Message, _MAX_BODY_BYTES)
