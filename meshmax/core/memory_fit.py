"""Whether a model would run on a peer's GPU: where it would not fit, it is counted as on the CPU.

A loaded model runs where its peer says. One on disk needs its file's size and some more (OVERHEAD) of the memory of all GPUs
together, since engines split a model over them, less what other programs use there: the peer's own models make room for it.
Where a driver tells no figures the peer's word counts. Pure. Not here: loading, and what goes for it (core.residency).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.status import Device, ModelPresence, PeerStatus

OVERHEAD: Final = 1.1  # of the file's size: a context of a few thousand tokens, scratch buffers


def device_of(model: ModelPresence, status: PeerStatus | None) -> Device:
    """Where ``model`` would run at the peer with ``status``."""
    if model.device != "gpu" or model.state == "loaded" or status is None:
        return model.device
    room = _room_bytes(status)
    return "cpu" if room is not None and model.size * OVERHEAD > room else "gpu"


def _room_bytes(status: PeerStatus) -> int | None:
    """GPU memory that other programs leave; None where the drivers do not tell."""
    total = used = 0
    for gpu in status.gpus:
        if gpu.memory_total_bytes <= 0:
            return None
        total += gpu.memory_total_bytes
        used += min(max(gpu.memory_bytes, 0), gpu.memory_total_bytes)
    if not total:
        return None
    own = sum(model.size for model in status.models if model.state == "loaded" and model.device == "gpu")
    return total - max(0, used - int(own * OVERHEAD))
