"""Which peer fetches a model that nobody who could answer has: where it would run best, and why others would not do.

Rules. Only where no peer with an engine has the model whole and takes prompts, and at least one has files of it to give.
A peer can hold it that has an engine and memory enough in all. A GPU with room for it goes before a GPU, that before a CPU;
at a tie ourselves, then who has some of it already, then who has the least to do, then the nearest. Whether there is room on a
disk shows by trying, so the order has several. Pure. Not here: fetching (services.pull_first).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import NO_ENGINE, ModelPresence, PeerStatus, PeerView
from meshmax.base.units import format_bytes

MAX_TRIES: Final = 3  # peers asked to fetch a model for one request; each may refuse
HEADROOM: Final = 1.1  # of memory beside the weights: context and buffers of a short conversation
NAMED: Final = 4  # peers named in one sentence

# From the best to the worst place.
_GPU_FITS, _GPU, _CPU = 0, 1, 2


class Taker(msgspec.Struct, frozen=True):
    """A peer that can hold the model."""

    peer_id: PeerId
    name: str
    ours: bool


class PullPlan(msgspec.Struct, frozen=True):
    """``takers``: whom to ask, best first. ``holders``: names of who has files of it. ``why``: what keeps each from answering."""

    takers: tuple[Taker, ...] = ()
    holders: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    able: bool = False  # somebody could answer as it is


def plan_pull(views: Iterable[PeerView], digest: Sha256, size: int) -> PullPlan:
    """Who could fetch the model ``digest`` of ``size`` bytes; ``views``: ourselves and everybody we know."""
    takers: list[tuple[tuple[object, ...], Taker]] = []
    holders: list[str] = []
    why: list[str] = []
    able = False
    for view in views:
        status = view.status
        if status is None or view.state == "offline":
            continue
        name = name_of(view)
        model = next((model for model in status.models if model.digest == digest), None)
        if model is not None:
            if not model.served:  # what an engine brings along has no files that could be fetched
                holders.append(name)
            reason = _kept_from(view, status, model)
            able = able or not reason
            why.append(f"{name} {reason}")
        if not _kept_from(view, status, None) and (model is None or model.state == "partial"):
            tier = _tier(status, size)
            if tier is not None:
                key = (
                    tier,
                    view.state != "self",
                    model is None,
                    status.load.running + status.load.queued,
                    view.rtt_s or 0.0,
                )
                takers.append(((*key, view.peer_id), Taker(view.peer_id, name, view.state == "self")))
    takers.sort(key=lambda each: each[0])
    order = tuple(taker for _, taker in takers)
    return PullPlan(order, tuple(holders[:NAMED]), tuple(why[:NAMED]), able)


def name_of(view: PeerView) -> str:
    """A peer as people call it."""
    return view.status.name if view.status and view.status.name else view.peer_id


def _kept_from(view: PeerView, status: PeerStatus, model: ModelPresence | None) -> str:
    """Why a peer would not answer a prompt with its copy; '' where it would."""
    if status.engine in ("", NO_ENGINE):
        return "only stores models (it has no engine)"
    if view.state == "draining" or status.draining:
        return "is being drained"
    if model is not None and model.state == "partial":
        return "has only a part of it"
    return ""


def _tier(status: PeerStatus, size: int) -> int | None:
    """How good a place it is; None where the model does not fit its memory."""
    needed = size * HEADROOM
    if status.gpus:
        total = sum(gpu.memory_total_bytes for gpu in status.gpus)
        if total >= needed:
            return _GPU_FITS
        if status.memory_total_bytes == 0 or total + status.memory_total_bytes >= needed:
            return _GPU
        return None
    return _CPU if status.memory_total_bytes == 0 or status.memory_total_bytes >= needed else None


def who_could(plan: PullPlan, name: str, size: int) -> str:
    """The end of a sentence that says no peer answers with the model: why, who could hold it, and what to type."""
    why = f" ({'; '.join(plan.why)})" if plan.why else ""
    if not plan.takers:
        return f"{why}, and no peer with an engine has room in memory for its {format_bytes(size)}"
    names = [taker.name for taker in plan.takers[:NAMED]]
    here = plan.takers[0].ours
    verb = f"`meshmax pull {name}`" if here else f"`meshmax distribute {name} --to {names[0]}`"
    return f"{why}; {', '.join(names)} could hold it: {verb} brings it to {'this peer' if here else names[0]}"
