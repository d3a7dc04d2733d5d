"""Which scopes open what: the protocols, and the requests of MODEL. In the open mesh all is open.

Rules: any one of the scopes is enough; a protocol that is not named is any member's. What a model is (its description) is for
whoever may use it; manifests, maps and chunks are for who may be sent it. Not here: who has which scopes (services.membership).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from meshmax.base.errors import OutOfScope
from meshmax.base.membership import SCOPES, Scope
from meshmax.wire import model
from meshmax.wire.protocols import BLOB, DRAIN, INFER, LANE, MODEL, PULL

Scopes = tuple[Scope, ...]

GUARDS: Final[dict[str, Scopes]] = {
    INFER: ("infer",),
    MODEL: ("infer", "pull", "admin"),  # each of its requests is guarded, too
    BLOB: ("pull",),
    LANE: ("pull",),
    DRAIN: ("admin",),
    PULL: ("admin",),
}
MODEL_GUARDS: Final[dict[type[model.FromAsker], Scopes]] = {
    model.Describe: ("infer", "pull", "admin"),
    model.GetModel: ("pull", "admin"),
    model.GetMap: ("pull", "admin"),
    model.GetBlobMap: ("pull", "admin"),
    model.Download: ("admin",),
}


def guard(held: Collection[Scope], wanted: Scopes, whose: str) -> None:
    """Raise OutOfScope unless ``held`` has one of ``wanted``. ``whose``: the certificate, in words."""
    if not set(wanted) & set(held):
        raise OutOfScope(lacking(wanted[0], whose))


def guard_protocol(held: Collection[Scope], protocol: str, whose: str) -> None:
    """Raise OutOfScope unless a member with the scopes ``held`` may use ``protocol``."""
    guard(held, GUARDS.get(protocol, SCOPES), whose)


def lacking(scope: Scope, whose: str) -> str:
    """The sentence for people: who lacks what, and what gives it."""
    return f"{whose} lacks the scope '{scope}': a ticket with it (`meshmax ticket --scope ...`) gives it"
