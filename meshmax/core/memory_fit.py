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
    total = used = 0
    for gpu in status.gpus:
        if gpu.memory_total_bytes <= 0:
            return "gpu"  # nobody tells
        total += gpu.memory_total_bytes
        used += min(max(gpu.memory_bytes, 0), gpu.memory_total_bytes)
    needed = model.size * OVERHEAD
    if needed <= total - used or not total:
        return "gpu"
    return "cpu" if needed > total or needed > total - max(0, used - _own_bytes(status)) else "gpu"


def _own_bytes(status: PeerStatus) -> int:
    """What the peer's own models use of its GPUs."""
    return int(OVERHEAD * sum(m.size for m in status.models if m.state == "loaded" and m.device == "gpu"))
