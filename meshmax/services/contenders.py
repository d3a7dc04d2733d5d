"""Who may answer a prompt, as of now: every peer with the model, ourselves too, and what is known of each.

Of ourselves we know better than our own status, which is a moment old. Not here: which of them is best (core.routing).
"""

from __future__ import annotations

from collections.abc import Hashable

import msgspec
import trio

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask
from meshmax.base.status import NO_ENGINE, Device, Load, ModelPresence, PeerView
from meshmax.core.contender import Contender, holders
from meshmax.core.eligibility import kept_out
from meshmax.core.estimate import wanted_context
from meshmax.core.explain import plain_name
from meshmax.core.memory_fit import device_of
from meshmax.core.prefixes import Mark, Prefixes
from meshmax.ports import Catalog, Presence, Residency
from meshmax.services.trial import Bench


class Contenders:
    """The contenders of one node's requests. ``prefixes``: who holds the beginnings of which prompts."""

    def __init__(self, bench: Bench, residency: Residency, catalog: Catalog, presence: Presence) -> None:
        self._bench, self._peer_id = bench, bench.peer_id
        self._residency, self._catalog, self._presence = residency, catalog, presence
        self.prefixes = Prefixes()

    def of(self, ask: Ask, marks: tuple[Mark, ...] = ()) -> dict[PeerId, Contender]:
        """Who has the model of ``ask``, as of now. ``marks``: the cuts of its prompt."""
        now = trio.current_time()
        views = self._presence.peers()
        found = {view.peer_id: (view, model) for view, model in holders(views, ask.digest)}
        own = self._own(ask, views, found.pop(self._peer_id, None))
        if own is not None:
            found[self._peer_id] = own
        held = self.prefixes.held(ask.digest, marks, now) if marks else {}
        tokens = wanted_context(ask.request)
        return {
            peer: self._contender(ask, view, model, held.get(peer, 0), tokens, now)
            for peer, (view, model) in found.items()
        }

    def stand(self, ask: Ask) -> Hashable:
        """Who has the model of ``ask`` and how each stands, as far as it decides whether, and from when, it may be asked."""
        found = []
        for peer, contender in sorted(self.of(ask).items()):
            kept, standing = kept_out(contender), contender.standing
            found.append((peer, kept and kept[0], standing.until_s, standing.probing))
        return tuple(found)

    def name_of(self, contender: Contender) -> str:
        """A peer as people call it; '' for ourselves."""
        view = contender.view
        if view.peer_id == self._peer_id:
            return ""
        return plain_name(view.status.name) if view.status and view.status.name else view.peer_id

    def _own(
        self, ask: Ask, views: tuple[PeerView, ...], stated: tuple[PeerView, ModelPresence] | None
    ) -> tuple[PeerView, ModelPresence] | None:
        """Ourselves, as we are now: our own status may lack a model that has just come."""
        view = next((view for view in views if view.peer_id == self._peer_id), None)
        if view is None or view.status is None:
            return None
        model = stated[1] if stated and stated[1].state != "partial" else None
        if model is None:
            entry = next((e for e in self._catalog.entries() if e.digest == ask.digest and e.is_here), None)
            if entry is None or (view.status.engine == NO_ENGINE and not entry.served):
                return None
            model = ModelPresence(ask.digest, (entry.name,), "disk", entry.size, _device(view))
        device = self._residency.device(ask.digest)
        if device is not None:
            return view, msgspec.structs.replace(model, state="loaded", device=device)
        return view, msgspec.structs.replace(model, state="disk")

    def _contender(
        self, ask: Ask, view: PeerView, model: ModelPresence, held: int, tokens: int, now: float
    ) -> Contender:
        peer, status, measured = view.peer_id, view.status, self._bench.measurements
        assert status is not None  # holders() and _own() say so
        waits, outstanding = self._bench.waits, self._bench.outstanding
        if peer == self._peer_id:
            load = _at_least(here := self._residency.load(), count := outstanding.count(peer))
            ahead = max(0, count - here.running - here.queued)
            told = waits.of(peer, model.digest, None, here, ahead, now)
        else:
            load = outstanding.load(peer, status.sequence, status.load)
            sent = outstanding.since(peer, status.sequence)
            told = waits.of(peer, model.digest, status.sequence, status.load, sent, now)
            if view.rtt_s is not None:
                measured.on_rtt(peer, view.rtt_s, now)
        standing = measured.breakers.standing(peer, model.digest, now, ask.priority)
        if standing.state == "open" and standing.code == Busy.code and peer != self._peer_id:
            has_room = load.running < load.capacity and not load.queued
            measured.breakers.on_load(peer, model.digest, has_room, now)
            standing = measured.breakers.standing(peer, model.digest, now, ask.priority)
        return Contender(
            view=view,
            model=model,
            load=load,
            figures=measured.figures(peer, model.digest, device_of(model, status), now),
            rtt_s=measured.rtt_s(peer),
            standing=standing,
            prefix_tokens=held,
            told=told if model.state == "loaded" else None,
            context_tokens=tokens,
        )


def _at_least(load: Load, total: int) -> Load:
    """``load``, but of ``total`` requests: those that were given to ourselves a moment ago are not in our queue yet."""
    if load.running + load.queued >= total:
        return load
    running = min(total, max(load.capacity, 1))
    return Load(running, total - running, load.capacity, load.limit, load.waits)


def _device(view: PeerView) -> Device:
    return "gpu" if view.status and view.status.gpus else "cpu"
