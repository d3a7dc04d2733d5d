"""A peer that has a model, and all that is needed to judge it for one prompt: what core.estimate, core.eligibility and
core.policies look at.

Pure words. Not here: where they come from (services.router), the judging.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from meshmax.base.ids import Sha256
from meshmax.base.status import NO_ENGINE, Load, ModelPresence, PeerView
from meshmax.core.breaker import CLOSED, Standing
from meshmax.core.measurements import Figures


class ToldWait(msgspec.Struct, frozen=True):
    """What a peer told of the wait for its model, in seconds: ``wait_s`` as we take it (core.told_wait), ``told_s`` as it was.

    ``free`` slots and ``queued`` requests were there then; ``sent``: how many more of ours there are now, or fewer (negative).
    """

    wait_s: float
    told_s: float = 0.0
    free: int = 0
    queued: int = 0
    sent: int = 0


class Contender(msgspec.Struct, frozen=True):
    """A peer and its copy of the model. ``load`` is as of now: `core.outstanding`. ``standing``: of its circuit
    breakers, for this model. ``prefix_tokens``: how many tokens of this prompt it holds from before, as we believe:
    `core.prefixes`. ``told``: its word on how long we would wait, None where it gave none that counts. ``context_tokens``: that
    this prompt wants, 0: any will do."""

    view: PeerView
    model: ModelPresence
    load: Load
    figures: Figures = Figures()
    rtt_s: float | None = None
    standing: Standing = CLOSED
    prefix_tokens: int = 0
    told: ToldWait | None = None
    context_tokens: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether the model is in memory there as this prompt wants it: with less context, by the peer's own word, it would be
        loaded anew, though with no more than it was trained for."""
        model = self.model
        if model.state != "loaded":
            return False
        there = model.loaded_context
        return there <= 0 or self.context_tokens <= there or 0 < model.context_length <= there

    @property
    def lacks_context(self) -> bool:
        """Whether the model is in memory there, but with too little context."""
        return self.model.state == "loaded" and not self.is_ready


def holders(views: Iterable[PeerView], digest: Sha256) -> list[tuple[PeerView, ModelPresence]]:
    """Who says it has something of the model, and an engine to run it: each peer with its own word about it."""
    found = []
    for view in views:
        status = view.status
        if status is None:
            continue
        for model in status.models:
            if model.digest == digest:
                if (model.engine or status.engine) != NO_ENGINE:
                    found.append((view, model))
                break
    return found
