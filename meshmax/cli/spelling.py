"""A model's name that nobody knows: what names look like, or which one was probably meant.

Only looked for after a peer has said that there is no such model. Not here: what a name is (base.names).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from meshmax.base.errors import MeshmaxError, NotFound
from meshmax.base.names import DEFAULT_TAG, parse_name, split_digest
from meshmax.cli.client import PeerClient
from meshmax.cli.output import printable

SIMILAR: Final = 0.75  # share of letters that two names have in common, in their order; "smol" is not "smollm2" by that
BEGUN: Final = 0.8  # where one is the beginning of the other, however much it lacks
MIN_BEGUN: Final = 3  # letters of that beginning
OTHER_TAG: Final = 0.95  # factor: the same tag is better
# What sentences say that know no more than that; others tell who has the model, or had it.
_BARE: Final = " not found"
_PERHAPS: Final = " not found; `meshmax pull "


@contextmanager
def corrected(client: PeerClient, name: str, *, here: bool = False) -> Iterator[None]:
    """Where the peer does not know ``name``, its error says which one may have been meant. ``here``: only this peer's count.

    Raises InvalidName in its place where no model can be called so.
    """
    try:
        yield
    except NotFound as error:
        bare = error.message.endswith(_BARE)
        if (bare or _PERHAPS in error.message) and (meant := meant_name(client, name, here=here)):
            raise type(error)(f"{error.message}{': d' if bare else '. D'}id you mean '{meant}'?") from None
        raise


def meant_name(client: PeerClient, name: str, *, here: bool = False) -> str:
    """The model that a peer knows whose name is much like ``name``, fit to be shown; '' where there is none.

    Raises InvalidName where no model can be called ``name``.
    """
    parse_name(split_digest(name)[0])
    try:
        models = client.get("/api/tags")["models"]
    except MeshmaxError:  # it has answered before: its first word is what to tell
        return ""
    return printable(most_like(name, [m["name"] for m in models if not (here and m.get("remote_host"))]))


def most_like(name: str, known: Iterable[str]) -> str:
    """That one of ``known`` which is most like ``name``, as short as it can be written; '' where none is like it."""
    wanted = _short(name)
    scored = [
        (_likeness(wanted.lower(), one.lower()), one) for one in map(_short, known) if one.lower() != wanted.lower()
    ]
    likeness, best = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return best if likeness >= SIMILAR else ""


def _short(name: str) -> str:
    return name.removesuffix(f":{DEFAULT_TAG}")


def _likeness(one: str, other: str) -> float:
    from difflib import SequenceMatcher

    first, second = (name.split("@")[0].split(":")[0] for name in (one, other))
    alike = SequenceMatcher(None, first, second).ratio()
    if min(len(first), len(second)) >= MIN_BEGUN and (first.startswith(second) or second.startswith(first)):
        alike = max(alike, BEGUN)
    return max(SequenceMatcher(None, one, other).ratio(), OTHER_TAG * alike)
