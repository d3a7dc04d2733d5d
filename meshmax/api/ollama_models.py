"""Lists and facts of models in Ollama's JSON: /api/tags, /api/ps, /api/show, and the lines of a pull.

A model that only peers hold carries ``remote_host`` (the name of a peer that has it) and ``remote_model``. Where the mesh
knows two models under one name, the further ones are listed as NAME@DIGEST, which every verb takes. Not here: HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from meshmax.api.stamps import rfc3339
from meshmax.base.catalog import CatalogEntry, LoadedView, ModelDescription
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import ModelDetails

SHORT_DIGEST: Final = 12  # digits of a digest that people see
LINE_INTERVAL_S: Final = 0.06  # Ollama's own pace of progress lines
LONG_ARRAY: Final = 5  # items of an array in model_info that is still shown
MAX_WAITS: Final = 32  # reasons told of one wait; more are no news to anybody
_DIGITS: Final = re.compile(r"\d+")
_FOR_EVER_S: Final = float((1 << 63) - 1) / 1e9  # how far away Ollama puts "for ever"
_HIDDEN_KEYS: Final = frozenset({"general.name", "tokenizer.chat_template"})
_LAST_PHASES: Final = ("verifying sha256 digest", "writing manifest")

PeerName = Callable[[PeerId], str]


def listed(entries: Sequence[CatalogEntry]) -> list[tuple[str, CatalogEntry]]:
    """(the name to show, entry), newest first; ours keeps the plain name where two models share it."""
    taken: set[str] = set()
    names: dict[int, str] = {}
    for at, entry in sorted(enumerate(entries), key=lambda item: not item[1].local):
        plain = entry.name not in taken
        names[at] = entry.name if plain else f"{entry.name}@{entry.digest[:SHORT_DIGEST]}"
        taken.add(entry.name)
    order = sorted(range(len(entries)), key=lambda at: -entries[at].modified_at_s)
    return [(names[at], entries[at]) for at in order]


def details_json(details: ModelDetails) -> dict[str, Any]:
    """The ``details`` object."""
    families = list(details.families) or ([details.family] if details.family else None)
    shown: dict[str, Any] = {
        "parent_model": "",
        "format": details.format,
        "family": details.family,
        "families": families,
        "parameter_size": details.parameter_size,
        "quantization_level": details.quantization_level,
    }
    if details.context_length:
        shown["context_length"] = details.context_length
    if details.embedding_length:
        shown["embedding_length"] = details.embedding_length
    return shown


def tags_json(entries: Sequence[CatalogEntry], peer_name: PeerName) -> dict[str, Any]:
    """The reply of /api/tags."""
    return {"models": [_tag(name, entry, peer_name) for name, entry in listed(entries)]}


def _tag(name: str, entry: CatalogEntry, peer_name: PeerName) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": name, "model": name}
    if not entry.is_here:
        shown |= remote_fields(entry, peer_name)
    shown |= {
        "modified_at": rfc3339(entry.modified_at_s),
        "size": entry.size,
        "digest": entry.digest,
        "details": details_json(entry.details),
    }
    if entry.pinned:
        shown["pinned"] = True  # more than Ollama tells, and only where there is something to tell
    if entry.details.capabilities:
        shown["capabilities"] = list(entry.details.capabilities)
    return shown


def remote_fields(entry: CatalogEntry, peer_name: PeerName) -> dict[str, str]:
    """``remote_model`` and ``remote_host`` of a model that is not here."""
    host = peer_name(entry.anywhere[0]) if entry.anywhere else "mesh"
    return {"remote_model": entry.name, "remote_host": host}


def ps_json(loaded: Sequence[LoadedView], now_s: float) -> dict[str, Any]:
    """The reply of /api/ps."""
    return {
        "models": [
            {
                "name": view.name,
                "model": view.name,
                "size": view.size,
                "digest": view.digest,
                "details": details_json(view.details),
                "expires_at": rfc3339(now_s + _FOR_EVER_S if view.expires_at_s is None else view.expires_at_s),
                "size_vram": view.size_vram,
                "context_length": view.context_length,
                **served_by(view.origin),
            }
            for view in loaded
        ]
    }


def served_by(origin: str) -> dict[str, Any]:
    """More than Ollama tells of a model that an engine brings along: whose it is."""
    return {"meshmax": {"served_by": origin}} if origin else {}


def show_json(name: str, described: ModelDescription, remote: dict[str, str], verbose: bool = False) -> dict[str, Any]:
    """The reply of /api/show."""
    shown: dict[str, Any] = {}
    if described.license:
        shown["license"] = described.license
    shown["modelfile"] = modelfile(name, described)
    if described.parameters:
        shown["parameters"] = "\n".join(f"{key:<30} {value}" for key, value in _parameters(described))
    if described.template:
        shown["template"] = described.template
    if described.system:
        shown["system"] = described.system
    shown["details"] = details_json(described.details)
    shown |= remote
    shown["model_info"] = {
        key: [] if not verbose and isinstance(value, list | tuple) and len(value) > LONG_ARRAY else value
        for key, value in described.model_info.items()
        if key not in _HIDDEN_KEYS
    }
    if verbose and described.tensors:
        shown["tensors"] = described.tensors
    if described.details.capabilities:
        shown["capabilities"] = list(described.details.capabilities)
    shown["modified_at"] = rfc3339(described.modified_at_s)
    return shown


def modelfile(name: str, described: ModelDescription) -> str:
    """A Modelfile from which the model could be made again."""
    lines = [
        '# Modelfile generated by "meshmax show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {name}",
        "",
        f"FROM {name}",
    ]
    # A Modelfile's templates are Go's; a Jinja one comes out of the GGUF itself and needs no line.
    template = "" if "{%" in described.template else described.template
    for word, text in (("TEMPLATE", template), ("SYSTEM", described.system)):
        if text:
            lines.append(f'{word} """{text}"""')
    lines += [f"PARAMETER {key} {value}" for key, value in _parameters(described)]
    if described.license:
        lines.append(f'LICENSE """{described.license}"""')
    return "\n".join(lines) + "\n"


def _parameters(described: ModelDescription) -> Iterator[tuple[str, str]]:
    for key, value in described.parameters.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            yield key, _go_value(item)


def _go_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class PullLines:
    """Turns a transfer's snapshots into the lines of Ollama's pull stream: phases once, layers when they moved.

    Why a transfer failed is not among them: whoever watches it raises that.
    """

    def __init__(self) -> None:
        self._phases: set[str] = {"pulling manifest"}
        self._done: dict[Sha256, int] = {}
        self._waits: set[str] = set()  # why it waited since it last went on, numbers left out: they change all the time
        self._waits_at = 0  # bytes that were here when it began to wait
        self._next_at_s = float("-inf")

    def first(self) -> list[dict[str, Any]]:
        """What every pull begins with."""
        return [{"status": "pulling manifest"}]

    def on_transfer(self, transfer: Transfer, now_s: float) -> list[dict[str, Any]]:
        """The lines that ``transfer`` adds; none while a running one was shown less than LINE_INTERVAL_S ago."""
        ended = transfer.state in ("done", "failed", "cancelled")
        phases = list(self._new_phases(transfer))
        if not ended and not phases and now_s < self._next_at_s:
            return []
        self._next_at_s = now_s + LINE_INTERVAL_S
        lines = [*self._layers(transfer), *({"status": phase} for phase in phases)]
        if transfer.state == "done":
            lines.append({"status": "success"})
        return lines

    def _new_phases(self, transfer: Transfer) -> Iterator[str]:
        seen = [transfer.phase] if transfer.phase and not transfer.phase.startswith("pulling") else []
        seen += [transfer.note] if transfer.note else []
        yield from self._waiting(transfer)
        # Whoever watched too slowly to see the last phases is still told that they took place.
        for phase in [*seen, *_LAST_PHASES] if transfer.state == "done" else seen:
            if phase != "success" and phase not in self._phases:
                self._phases.add(phase)
                yield phase

    def _waiting(self, transfer: Transfer) -> Iterator[str]:
        """Why it waits, and that it goes on as soon as more has come: one that tries again may go back to waiting."""
        if transfer.state in ("waiting", "paused") and transfer.reason:
            text = f"{transfer.state}: {transfer.reason}"
            if not self._waits:
                self._waits_at = transfer.bytes_done
            if (kind := _DIGITS.sub("", text)) not in self._waits and len(self._waits) < MAX_WAITS:
                self._waits.add(kind)
                yield text
        elif transfer.state == "running" and self._waits and transfer.bytes_done > self._waits_at:
            self._waits.clear()
            yield "going on"

    def _layers(self, transfer: Transfer) -> Iterator[dict[str, Any]]:
        for blob in transfer.blobs:
            if self._done.get(blob.digest) == blob.done:
                continue
            self._done[blob.digest] = blob.done
            line: dict[str, Any] = {
                "status": f"pulling {blob.digest[:SHORT_DIGEST]}",
                "digest": f"sha256:{blob.digest}",
                "total": blob.size,
            }
            if blob.done:
                line["completed"] = blob.done
            if pace := _pace(transfer):
                line["meshmax"] = pace
            yield line


def _pace(transfer: Transfer) -> dict[str, Any]:
    """How fast it goes and from how many peers, beside what Ollama tells; nothing while nobody gives anything."""
    sources = sum(bool(peer.lanes or peer.wants or peer.rate_bytes_per_s) for peer in transfer.peers.values())
    if not sources:
        return {}
    rate, eta_s = transfer.rate_bytes_per_s, transfer.eta_s
    return {
        "sources": sources,
        "rate_bytes_per_s": round(rate),
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }
