"""What names mean: our own models and those that peers say they have, merged.

Rules (a name means, in this order): what it is pinned to; what is in our store; what an engine here brings along; then, of
the digests that online peers offer under that name, the one that was seen first in this mesh (`FirstSeen` remembers it, so
that a newcomer cannot take a name over, nor push names of others out by offering many). Who offered it may take it back:
the name then means what that peer calls so now, or is free, where nobody else known has the first one. Two digests under one
name are two entries and are never mixed; ``NAME@DIGEST`` chooses. Partial copies make nobody a holder: they are listed apart,
and a model that is nowhere whole is an entry only for who wants to pull it. Who runs a model that its engine brings along is a
server of it and no holder.
Not here: fetching, files, who answers a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from meshmax.base.catalog import CatalogEntry, FirstOffer, OfferedModel, Resolved
from meshmax.base.errors import InvalidName, ModelNotFound
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import ModelDetails, StoredModel
from meshmax.base.names import ModelName, parse_name, split_digest
from meshmax.base.status import ModelPresence, PeerStatus, PeerView

KEPT_DIGEST: Final = 12  # digits of a digest in the name of a model that lost its name
MAX_TAG_KEPT: Final = 80 - KEPT_DIGEST - 1  # characters of its tag that fit before them
MAX_FIRST_SEEN: Final = 4096  # names remembered, of all peers
SETTLED_S: Final = 30.0  # after the start: until then others who have the first one may not have been met again
FREE_AFTER_S: Final = 60.0  # without its model a name is free: an engine that is started again has its models sooner


class AnotherThere(ModelNotFound):
    """The model that was first seen under a name is not there, another one is. ``hint``: how to choose that."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.hint = hint


class FirstSeen:
    """The digest that each name had when this node first heard of it, and from whom.

    When it is full, the oldest name of the peer that offered the most goes, so that one peer with many names pushes out
    its own. What we named ourselves goes only where nothing else is left.
    """

    __slots__ = ("_began_s", "_missing", "_offers", "_origins")

    def __init__(self, offers: Mapping[str, FirstOffer] | None = None) -> None:
        self._offers: dict[str, FirstOffer] = {}
        self._origins: dict[str, dict[str, None]] = {}  # names by who offered them, oldest first
        self._missing: dict[str, float] = {}  # names without their model, since when
        self._began_s: float | None = None  # the first review
        for key, offer in (offers or {}).items():
            self.note(key, offer.digest, offer.origin)

    def note(self, key: str, digest: Sha256, origin: PeerId | Literal[""] = "") -> bool:
        """Remember ``digest``, offered by ``origin``, for the name with ``key`` unless there is one; True if it was new."""
        if key in self._offers:
            return False
        while len(self._offers) >= MAX_FIRST_SEEN:
            self.forget(self._least(origin))
        self._offers[key] = FirstOffer(digest, origin)
        self._origins.setdefault(origin, {})[key] = None
        return True

    def _least(self, newcomer: str) -> str:
        """The name to forget when ``newcomer`` offers one more."""
        # Of two that offered equally many it is the newcomer's that goes.
        crowds = {origin: (len(keys), origin == newcomer) for origin, keys in self._origins.items() if origin}
        largest = max(crowds, key=crowds.__getitem__, default="")
        return next(iter(self._origins[largest]))

    def get(self, key: str) -> Sha256 | None:
        """The digest first seen under the name, or None."""
        offer = self._offers.get(key)
        return offer.digest if offer else None

    def forget(self, key: str) -> None:
        """The person chose another meaning for this name (added, copied or deleted it here)."""
        offer = self._offers.pop(key, None)
        self._missing.pop(key, None)
        if offer is not None:
            keys = self._origins[offer.origin]
            del keys[key]
            if not keys:
                del self._origins[offer.origin]

    def review(self, views: Iterable[PeerView], now: float) -> bool:
        """Let go of names whose offerer is there and took them back; True if one was. ``now``: monotonic, in seconds.

        ``views``: everybody known, ourselves too, also who is offline for a short while. Nothing is let go where one of
        them has the first model under the name.
        """
        if self._began_s is None:
            self._began_s = now
        if now - self._began_s < SETTLED_S:
            return False
        views = tuple(views)
        there = [
            v.peer_id for v in views if v.state in ("online", "draining") and v.status and v.peer_id in self._origins
        ]
        if not there:
            self._missing = {}
            return False
        listed = {view.peer_id: _digests_of(view.status) for view in views if view.status}
        missing: dict[str, float] = {}
        given: dict[str, FirstOffer | None] = {}
        for peer in there:
            for key in self._origins[peer]:
                digest = self._offers[key].digest
                if any(digest in names.get(key, ()) for names in listed.values()):
                    continue
                missing[key] = self._missing.get(key, now)
                whole = [each for each, is_whole in listed[peer].get(key, {}).items() if is_whole]
                if whole:
                    given[key] = FirstOffer(whole[0], peer)
                elif now - missing[key] >= FREE_AFTER_S:
                    given[key] = None
        self._missing = missing
        for key, offer in given.items():
            self.forget(key)
            if offer is not None:
                self.note(key, offer.digest, offer.origin)
        return bool(given)

    def items(self) -> dict[str, FirstOffer]:
        """All of it, oldest first, for keeping."""
        return dict(self._offers)


def _digests_of(status: PeerStatus) -> dict[str, dict[Sha256, bool]]:
    """What a peer lists under each name's key, and whether that is more than a part of it."""
    found: dict[str, dict[Sha256, bool]] = {}
    for model in status.models:
        for name in model.names:
            digests = found.setdefault(_key_of(name), {})
            digests[model.digest] = digests.get(model.digest, False) or model.state != "partial"
    return found


def _key_of(text: str) -> str:
    if text.count("/") == 2 and ":" in text.rpartition("/")[2]:
        return text.lower()  # whole, as peers tell names: they may tell thousands, and are looked at often
    try:
        return parse_name(text).key
    except InvalidName:
        return text


def merge(
    own: PeerId,
    local: Iterable[StoredModel],
    views: Iterable[PeerView],
    fractions: Mapping[Sha256, float],
    *,
    parts: bool = False,
    offered: Iterable[OfferedModel] = (),
) -> tuple[CatalogEntry, ...]:
    """Every (name, digest) that can be used, newest first. ``fractions``: share of each digest's bytes here, 0 to 1.

    ``parts``: also those of which online peers have parts only. ``offered``: what engines of this node bring along.
    """
    entries: dict[tuple[str, Sha256], CatalogEntry] = {}
    for stored in local:
        digest = stored.manifest.digest
        entries[parse_name(stored.name).key, digest] = CatalogEntry(
            stored.name, digest, stored.manifest.size, stored.modified_at_s, stored.details, True, (own,), 1.0
        )
    for offer in offered:
        _merge_offered(entries, own, offer)
    for view in views:
        if view.status is None or view.state not in ("online", "draining"):
            continue
        for model in view.status.models:
            _merge_remote(entries, view.peer_id, model, fractions)
    listed = (entry for entry in entries.values() if parts or entry.holders or entry.servers)
    return tuple(sorted(listed, key=lambda entry: (-entry.modified_at_s, entry.name, entry.digest)))


def _merge_offered(entries: dict[tuple[str, Sha256], CatalogEntry], own: PeerId, offer: OfferedModel) -> None:
    try:
        name = parse_name(offer.name)
    except InvalidName:
        return
    entry = entries.get((name.key, offer.digest))
    if entry is None:
        at_s = offer.modified_at_s
        entry = CatalogEntry(str(name), offer.digest, offer.size, at_s, offer.details, False)
    entries[name.key, offer.digest] = msgspec.structs.replace(entry, servers=(own,), served=True)


def _merge_remote(
    entries: dict[tuple[str, Sha256], CatalogEntry],
    peer: PeerId,
    model: ModelPresence,
    fractions: Mapping[Sha256, float],
) -> None:
    for text in model.names:
        try:
            name = parse_name(text)
        except InvalidName:
            continue  # a peer's mistake; its other names may be good
        entry = entries.get((name.key, model.digest))
        whole, first = model.is_copy, entry is None or not (entry.holders or entry.servers)
        if entry is None or (first and model.state != "partial"):
            parted = entry.partial_holders if entry else ()
            entry = CatalogEntry(
                str(name),
                model.digest,
                model.size,
                float(model.modified_at_s),
                details_of(model),
                False,
                fraction=fractions.get(model.digest, 0.0),
                partial_holders=parted,
            )
        # Once, however often it says so: whoever asks the holders one by one would ask it again and again.
        if whole and peer not in entry.holders:
            entry = msgspec.structs.replace(entry, holders=(*entry.holders, peer))
        elif model.served and peer not in entry.servers:
            entry = msgspec.structs.replace(entry, servers=(*entry.servers, peer))
        elif model.state == "partial" and peer not in entry.partial_holders:
            entry = msgspec.structs.replace(entry, partial_holders=(*entry.partial_holders, peer))
        entries[name.key, model.digest] = entry


def details_of(model: ModelPresence) -> ModelDetails:
    """The details that a status carries."""
    return ModelDetails(
        family=model.family,
        families=(model.family,) if model.family else (),
        parameter_size=model.parameter_size,
        quantization_level=model.quantization_level,
        context_length=model.context_length,
        embedding_length=model.embedding_length,
        capabilities=model.capabilities,
    )


def held_elsewhere(digest: Sha256, views: Iterable[PeerView]) -> bool:
    """Whether one of ``views`` is online and says that it has the whole model ``digest``."""
    return any(
        model.digest == digest and model.is_copy
        for view in views
        if view.status and view.state in ("online", "draining")
        for model in view.status.models
    )


def last_holder(text: str, views: Iterable[PeerView]) -> PeerView | None:
    """Who of those that left had the model that ``text`` names, the last one seen; None if nobody. Raises InvalidName."""
    name_text, digest = split_digest(text)
    key = parse_name(name_text).key
    had = [
        view
        for view in views
        if view.state == "offline" and view.status and any(_means(m, key, digest or "") for m in view.status.models)
    ]
    return max(had, key=lambda view: view.last_seen_s, default=None)


def _means(model: ModelPresence, key: str, digest: str) -> bool:
    return model.state != "partial" and model.digest.startswith(digest) and key in map(str.lower, model.names)


def name_of_kept(name: ModelName, digest: Sha256) -> ModelName:
    """The name that the model ``digest`` gets when ``name``, which was its only one, is given away."""
    return msgspec.structs.replace(name, tag=f"{name.tag[:MAX_TAG_KEPT]}-{digest[:KEPT_DIGEST]}")


def resolve(
    text: str,
    entries: Iterable[CatalogEntry],
    local: Iterable[StoredModel],
    first_seen: FirstSeen,
    pinned: Sha256 | None = None,
) -> Resolved:
    """What ``text`` means; ``pinned``: the digest to which its name is pinned.

    Raises InvalidName, ModelNotFound (whose message is Ollama's).
    """
    name_text, digest = split_digest(text)
    name = parse_name(name_text)
    entries = tuple(entries)
    named = [entry for entry in entries if parse_name(entry.name).key == name.key]
    if digest is not None:
        named = [entry for entry in named if entry.digest.startswith(digest)]
    elif pinned is not None:
        same = [entry for entry in entries if entry.digest == pinned]
        # Where nobody calls it so any more, it is what it is under another name.
        named = [entry for entry in named if entry.digest == pinned] or [
            msgspec.structs.replace(entry, name=str(name), local=False) for entry in same[:1]
        ]
        if not named:
            raise ModelNotFound(
                f"model '{text}' not found: it is pinned to {pinned[:12]}, which nobody who is online has;"
                f" `meshmax unpin {name}` lets it mean another one"
            )
    elif not any(entry.is_here for entry in named):
        seen = first_seen.get(name.key)
        others = [entry.digest for entry in named]
        named = [entry for entry in named if seen in (None, entry.digest)]
        if others and not named:
            raise AnotherThere(
                f"model '{text}' not found: nobody who is online has the one that was first seen under this name",
                f"another one is there: use {name}@{others[0][:12]} if that is meant",
            )
    if not named:
        raise ModelNotFound(f"model '{text}' not found")
    entry = min(named, key=lambda entry: (not entry.local, not entry.served))
    stored = next((s for s in local if s.manifest.digest == entry.digest and parse_name(s.name).key == name.key), None)
    return Resolved(entry.name, entry.digest, entry, stored)
