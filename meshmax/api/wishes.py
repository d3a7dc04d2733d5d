"""What a prompt's headers ask for, in all three interfaces, whose bodies have no place for it.

X-Meshmax-Priority: how urgent it is. X-Meshmax-Policy: by which policy it is routed. X-Meshmax-Pull: whether a peer may fetch the
model first where nobody has it. One that is not valid is an error that says what is accepted; left out, the node's own
configuration counts.
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


def _one_of(headers: Headers, name: str, accepted: Sequence[Word]) -> Word | None:
    given = headers.get(name)
    if given is None:
        return None
    found = next((word for word in accepted if word == given.strip().lower()), None)
    if found is None:
        raise InvalidRequest(f"the header {name} is one of {', '.join(accepted)}, not {given[:40]!r}")
    return found
