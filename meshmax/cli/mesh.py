"""The commands about the mesh: who is there (peers) and how this peer is (status)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE
from meshmax.base.units import NS_PER_S, format_bytes
from meshmax.cli.client import Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, human_duration, human_time, parse_time_s, printable, table

MODELS_SHOWN: Final = 3  # of a peer, in the table; --json has all
LABEL_WIDTH: Final = 12
Verbose = Annotated[bool, Parameter(name=("--verbose", "-v"), help="Also how the path to each came about.")]
_CIRCUIT: Final = "/p2p-circuit"
_LOOPBACK: Final = ("127.0.0.1", "::1")
_ORDER: Final = {"self": 0, "online": 1, "draining": 2, "offline": 3}


def peers(*, verbose: Verbose = False, as_json: AsJson = False, target: Target = HERE) -> None:
    """List the peers of the mesh that this peer sees, itself first."""
    with open_client(target) as client:
        answer = client.get("/api/v1/nodes")
    if as_json:
        emit_json(answer)
        return
    header: tuple[str, ...] = ("NAME", "PEER ID", "ADDRESS", "PATH", "RTT", "MODELS", "GPU", "LOAD")
    nodes = sorted(answer["nodes"].values(), key=_nearest_first)
    rows = [_peer_row(node, time.time()) for node in nodes]
    if verbose:
        header = (*header, "VIA")
        rows = [(*row, node.get("path_via") or "-") for row, node in zip(rows, nodes, strict=True)]
    emit(table(header, rows))


def _nearest_first(node: dict[str, Any]) -> tuple[int, float, str]:
    rtt_ms = node.get("rtt_ms")
    return _ORDER.get(node["status"], len(_ORDER)), float("inf") if rtt_ms is None else rtt_ms, node["id"]


def _peer_row(node: dict[str, Any], now_s: float) -> tuple[str, ...]:
    status = node["status"]
    name = node.get("name") or "-"
    address = _shown_address(node)
    rtt_ms = node.get("rtt_ms")
    rtt = "self" if status == "self" else "-" if rtt_ms is None else f"{rtt_ms:.1f} ms"
    gpus = ", ".join(gpu["name"] for gpu in node.get("gpus") or ()) or "-"
    path = "-" if status in ("self", "offline") else node.get("path") or "-"
    return (name, node["id"], address, path, rtt, _models(node.get("models") or ()), gpus, _load(node, now_s))


def _shown_address(node: dict[str, Any]) -> str:
    """Where it is reached: by the connection in use, else at the address of those it tells that serves others best."""
    told = sorted(node.get("addresses") or (), key=lambda text: (_host(text) in _LOOPBACK, _CIRCUIT in text))
    used = node.get("address") or "" if node["status"] in ("online", "draining") else ""
    if used:
        if _CIRCUIT in used or node.get("path") == "relay":
            return f"relay {_host(used)}"
        # What came to us has a port for this connection alone: one it listens at, at the same place, tells more.
        told = [text for text in told if _CIRCUIT not in text and _host(text) == _host(used)] or [used]
    address = next(iter(told), "-")
    return f"over relay {_host(address)}" if _CIRCUIT in address else address.partition("/p2p/")[0]


def _host(address: str) -> str:
    """The host in a multiaddr; of a way over a relay, the relay's."""
    parts = address.split("/")
    return "".join(parts[4:5] if parts[1:2] == ["ip6zone"] else parts[2:3]) or address


def _models(models: Any) -> str:
    marks = {"loaded": " (loaded)", "partial": " (partial)"}
    shown = [_short(model["name"]) + marks.get(model.get("state"), "") for model in models]
    more = f", +{len(shown) - MODELS_SHOWN}" if len(shown) > MODELS_SHOWN else ""
    return ", ".join(shown[:MODELS_SHOWN]) + more or "-"


def _short(name: str) -> str:
    return name.removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":latest")


def _load(node: dict[str, Any], now_s: float) -> str:
    if node["status"] == "offline":
        return f"gone, seen {human_time(parse_time_s(node.get('last_seen') or ''), now_s, 'never')}"
    load = node.get("load") or {}
    busy = [f"{load[key]} {key}" for key in ("running", "queued") if load.get(key)]
    text = ", ".join(busy) or "idle"
    return f"{text}, draining" if node["status"] == "draining" or node.get("draining") else text


_REACH_WORDS: Final = {
    "private": "not directly",
    "mapped": "through the router",
    "public": "yes",
    "unknown": "not known",
}
_NAT_WORDS: Final = {"udp": "UDP", "mapping": "mapping", "filtering": "filtering", "tcp_mapping": "TCP mapping"}


def status(*, as_json: AsJson = False, target: Target = HERE) -> None:
    """Show how this peer is: addresses, neighbours, models, resources."""
    with open_client(target) as client:
        state = client.get("/api/v1/status")
        nodes = client.get("/api/v1/nodes")["nodes"]
        models = client.get("/api/v1/models")["models"]
        url = client.url
    if as_json:
        emit_json({**state, "api": url, "nodes": nodes, "models": models})
    else:
        emit(describe(state, url, nodes, models))


def describe(state: dict[str, Any], url: str, nodes: dict[str, Any], models: dict[str, Any]) -> str:
    """The lines of `meshmax status`."""
    online = sum(node["status"] in ("online", "draining") for node in nodes.values())
    uptime = human_duration(state.get("uptime", 0) / NS_PER_S).lower()
    lines = [
        ("name", state.get("name") or "-"),
        ("peer id", state["node_id"]),
        ("version", state["version"]),
        ("state", f"{state['state']}, {'for' if state['state'] == 'running' else 'up for'} {uptime}"),
        ("mesh", _mesh_words(state)),
        ("api", url),
        *(("address" if at == 0 else "", text) for at, text in enumerate(state.get("addresses") or ())),
        *_reach_lines(state.get("reachability") or {}, _relay_names(state, nodes)),
        ("peers", f"{online} online"),
        *_discovery_lines(state.get("discovery") or ()),
        ("models", _model_counts(models.values(), state["node_id"])),
        *_backend_lines(state.get("backends") or ()),
        *(("problem", text) for text in state.get("problems") or ()),
        *_partial_lines(state.get("partials") or ()),
        *_resource_lines(state.get("resources") or {}),
    ]
    return "\n".join(f"{label:<{LABEL_WIDTH}}  {printable(str(text))}".rstrip() for label, text in lines)


def _relay_names(state: dict[str, Any], nodes: dict[str, Any]) -> dict[str, str]:
    """What to call relays, by PeerId: members by their names, bootstrap nodes by their hosts."""
    named = [each["address"].rpartition("/p2p/") for each in reversed(state.get("bootstrap") or ())]
    hosts = {peer_id: _host(address) for address, _, peer_id in named}
    return hosts | {peer_id: node["name"] for peer_id, node in nodes.items() if node.get("name")}


def _reach_lines(where: dict[str, Any], relay_names: dict[str, str]) -> list[tuple[str, str]]:
    """How others outside reach this peer, and what its NAT does where one is known; nothing where nobody was asked."""
    nat, state = where.get("nat") or {}, where.get("state", "unknown")
    known = [f"{name} {nat[key]}" for key, name in _NAT_WORDS.items() if nat.get(key, "unknown") != "unknown"]
    lines = (
        [] if state == "unknown" and not known else [("reachable", f"{_REACH_WORDS.get(state, state)}: {where['why']}")]
    )
    if known:
        lines.append(("nat", ", ".join(known)))
    lines += [
        ("mapping", f"{each['protocol']} {each['port']} at {each['external']}, by {each['by']}")
        for each in where.get("mappings") or ()
    ]
    if state == "private" and not where.get("mappings") and where.get("mapping_why"):
        lines.append(("mapping", f"none: {where['mapping_why']}"))
    if relays := where.get("relays"):
        lines.append(("relayed by", ", ".join(relay_names.get(peer_id, peer_id) for peer_id in relays)))
    return lines


def _discovery_lines(reports: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The rungs that are climbed; `meshmax doctor` says more."""
    climbed = [report for report in reports if report["state"] != "off"]
    words = [
        f"{report['name']} {report['found']}" + " (failing)" * (report["state"] == "failing") for report in climbed
    ]
    lines = [("found by", ", ".join(words) + " (`meshmax doctor` says more)")] if words else []
    unused = any(report.get("problem") == BOOTSTRAP_OUTSIDE for report in reports if report["state"] == "off")
    return [*lines, ("bootstrap", f"not used: {BOOTSTRAP_OUTSIDE}")] if unused else lines


def _backend_lines(backends: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The engines of others that this peer uses, or would."""
    return [
        ("engine", f"{each['origin']}: {_count(each['models'], 'model')}" if each["models"] else _no_models(each))
        for each in backends
    ]


def _mesh_words(state: dict[str, Any]) -> str:
    if joining := state.get("joining"):
        return f"joining '{joining}'"
    alone = not state.get("mesh_id") and (state.get("reachability") or {}).get("lan") is False
    return "open, not announced on the LAN (--no-lan)" if alone else state.get("mesh") or "open LAN mesh"


def _model_counts(models: Iterable[dict[str, Any]], own_id: str) -> str:
    """How many are in the store, how many engines beside this peer serve, and how many the mesh can use, these included."""
    models = list(models)
    stored = sum(bool(model.get("local")) for model in models)
    served = sum(not model.get("local") and own_id in (model.get("servers") or ()) for model in models)
    beside = f" and {served} of the engines below" if served else ""
    return f"{stored} here{beside}, {len(models)} in the mesh"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _no_models(backend: dict[str, Any]) -> str:
    return f"{backend['engine']}: no models{': ' * bool(backend.get('problem'))}{backend.get('problem') or ''}"


def _partial_lines(partials: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (
            "partial",
            f"{format_bytes(each['here_bytes'])} of {each['name']} ({format_bytes(each['size_bytes'])}); {_further(each)}",
        )
        for each in partials
    ]


def _further(part: dict[str, Any]) -> str:
    """How a partial becomes whole, or goes."""
    pull, name = part.get("transfer"), part["name"]
    if not pull:
        return f"`meshmax pull {name}` goes on, `meshmax rm {name}` frees it"
    if part.get("state") == "paused":
        return f"paused, `meshmax transfers resume {pull}` goes on, `meshmax transfers cancel {pull}` gives it up"
    return f"{part.get('state')}, `meshmax transfers` says what for"


def _resource_lines(resources: dict[str, Any]) -> list[tuple[str, str]]:
    if not resources:
        return []
    memory = (
        f"{format_bytes(resources.get('memory_bytes', 0))} of {format_bytes(resources.get('memory_total_bytes', 0))}"
    )
    gpus = [
        f"{gpu['name']}, {format_bytes(gpu.get('memory_bytes', 0))} of {format_bytes(gpu.get('memory_total_bytes', 0))}"
        for gpu in resources.get("gpus") or ()
    ]
    return [
        ("cpu", f"{resources.get('cpu_percent', 0):.0f} %"),
        ("memory", memory),
        ("disk free", format_bytes(resources.get("disk_free_bytes", 0))),
        *(("gpu", text) for text in gpus or ["none"]),
    ]
