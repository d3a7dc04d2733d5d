"""The mesh's own JSON (mesh-api): nodes, models, transfers. Pure translation of views into reply objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from meshmax.api.ollama_models import listed
from meshmax.api.stamps import rfc3339
from meshmax.base.catalog import BackendReport, CatalogEntry
from meshmax.base.errors import InvalidName
from meshmax.base.events import Transfer
from meshmax.base.names import parse_name
from meshmax.base.status import Gpu, ModelPresence, PeerStatus, PeerView
from meshmax.base.traversal import PathStory


def node_json(view: PeerView, story: PathStory | None = None) -> dict[str, Any]:
    """One node as /api/v1/nodes shows it; ``story``: how the path to it came about, where it is connected."""
    status = view.status
    return {
        "id": view.peer_id,
        "name": status.name if status else "",
        "status": view.state,
        "draining": bool(status and status.draining),
        "addresses": list(status.addresses) if status else [],
        "address": view.address,
        "path": view.path,
        "path_via": story.via if story else "",
        "connect_ms": story.connect_ms if story else None,
        "direct_ms": story.direct_ms if story else None,
        "rtt_ms": None if view.rtt_s is None else round(view.rtt_s * 1000, 3),
        "models": [_presence_json(model, name) for model in status.models for name in model.names] if status else [],
        "gpus": [gpu_json(gpu) for gpu in status.gpus] if status else [],
        "load": {"running": status.load.running, "queued": status.load.queued} if status else None,
        "usage": {"cpu": status.cpu_percent, "memory": _memory_percent(status)} if status else None,
        "version": status.version if status else "",
        "last_seen": rfc3339(view.last_seen_s),
    }


def _presence_json(model: ModelPresence, name: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": _short(name), "digest": model.digest, "state": model.state}
    return shown | ({"engine": model.engine, "served": model.served} if model.engine else {})


def backends_json(reports: Sequence[BackendReport]) -> list[dict[str, Any]]:
    """Engines that bring models along."""
    return [msgspec.to_builtins(one) for one in reports]


def _short(name: str) -> str:
    try:
        return str(parse_name(name))
    except InvalidName:
        return name


def _memory_percent(status: PeerStatus) -> float:
    total = status.memory_total_bytes
    return round(100 * status.memory_bytes / total, 1) if total else 0.0


def gpu_json(gpu: Gpu) -> dict[str, Any]:
    """One GPU."""
    return {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "memory_total_bytes": gpu.memory_total_bytes}


def models_json(entries: Sequence[CatalogEntry]) -> dict[str, Any]:
    """The reply of /api/v1/models."""
    return {"models": {name: model_json(name, entry) for name, entry in listed(entries)}}


def model_json(name: str, entry: CatalogEntry) -> dict[str, Any]:
    """One model. ``pinned``: no sweep takes our copy, and a name here is tied to it."""
    return {
        "name": name,
        "digest": entry.digest,
        "size": entry.size,
        "local": entry.local,
        "fraction": 1.0 if entry.local else entry.fraction,
        "pinned": entry.pinned,
        "holders": list(entry.holders),
        "servers": list(entry.servers),
    }


def transfer_json(transfer: Transfer) -> dict[str, Any]:
    """One transfer; ``phase`` and ``blobs`` are more than mesh-api promises."""
    shown: dict[str, Any] = msgspec.to_builtins(transfer)
    return shown
