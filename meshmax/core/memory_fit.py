"""Whether a model would run on a peer's GPU: where it would not fit into what is free, it is counted as on the CPU.

A loaded model runs where its peer says. One on disk needs its file's size and some more (OVERHEAD) of the free memory of
all GPUs together, since engines split a model over them; the models that a peer has loaded go when it is idle, so what they
take counts as free there. Where a driver tells no figures the peer's word counts. Pure. Not here: loading (engine).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.status import Device, Load, ModelPresence, PeerStatus

OVERHEAD: Final = 1.1  # of the file's size: context, scratch buffers; the context of a few thousand tokens, at that


def device_of(model: ModelPresence, status: PeerStatus | None, load: Load) -> Device:
    """Where ``model`` would run at the peer with ``status`` and, as of now, ``load``."""
    if model.device != "gpu" or model.state == "loaded" or status is None:
        return model.device
    free = _free_bytes(status, load)
    return "cpu" if free is not None and model.size * OVERHEAD > free else "gpu"


def _free_bytes(status: PeerStatus, load: Load) -> int | None:
    """Free memory of its GPUs; None where their drivers do not tell."""
    free = 0
    for gpu in status.gpus:
        if gpu.memory_total_bytes <= 0:
            return None
        free += max(0, gpu.memory_total_bytes - max(gpu.memory_bytes, 0))
    if not status.gpus:
        return None
    if load.running + load.queued <= 0:
        free += sum(m.size for m in status.models if m.state == "loaded" and m.device == "gpu")
    return free
