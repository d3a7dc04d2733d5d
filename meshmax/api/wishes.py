"""What a prompt's headers ask for, in all three interfaces, whose bodies have no place for it.

X-Meshmax-Priority: how urgent it is. X-Meshmax-Policy: by which policy it is routed. X-Meshmax-Pull: whether a peer may fetch the
model first where nobody has it. One that is not valid is an error that says what is accepted; left out, the node's own
configuration counts. X-Meshmax-Ahead: prompt, with a look at a model: a prompt for it follows where that is not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar, get_args

from starlette.datastructures import Headers

from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import Priority
from meshmax.base.route import POLICIES, Wishes

PRIORITY: Final = "X-Meshmax-Priority"
POLICY: Final = "X-Meshmax-Policy"
PULL: Final = "X-Meshmax-Pull"
AHEAD: Final = "X-Meshmax-Ahead"
HEADERS: Final = (PRIORITY, POLICY, PULL)

PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
_FLAGS: Final = ("true", "false")

Word = TypeVar("Word", bound=str)


def asked_priority(headers: Headers) -> Priority:
    """How urgent a prompt is; interactive if it does not say. Raises InvalidRequest."""
    return _one_of(headers, PRIORITY, PRIORITIES) or "interactive"


def asked_wishes(headers: Headers) -> Wishes:
    """What a prompt asks of its routing. Raises InvalidRequest."""
    pull = _one_of(headers, PULL, _FLAGS)
    return Wishes(_one_of(headers, POLICY, POLICIES), None if pull is None else pull == "true")


def is_ahead(headers: Headers) -> bool:
    """Whether a prompt for the model that is looked at follows. Raises InvalidRequest."""
    return _one_of(headers, AHEAD, ("prompt",)) is not None


def _one_of(headers: Headers, name: str, accepted: Sequence[Word]) -> Word | None:
    if name not in headers:
        return None
    given = headers.getlist(name)
    if len(given) > 1:  # which of them counts nobody could say
        raise InvalidRequest(f"the header {name} comes {len(given)} times: send one of {', '.join(accepted)}, once")
    found = next((word for word in accepted if word == given[0].strip().lower()), None)
    if found is None:
        raise InvalidRequest(f"the header {name} is one of {', '.join(accepted)}, not {given[0][:40]!r}")
    return found
