"""The mesh's own interface over HTTP (mesh-api): what is there, where prompts went; and adding a model.

Bodies are JSON with that content type, unknown fields are errors that name them. Routes act on this node. What mesh-api
lists and is not here is in app.py's table of closed routes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import trio
from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax import __version__
from meshmax.api import mesh_words
from meshmax.api.bodies import read_words
from meshmax.api.exchange import Emit, WorkReply
from meshmax.api.ollama_routes import delete_model
from meshmax.api.ollama_words import Name
from meshmax.api.prompts import Prompts
from meshmax.api.reach_words import reachability_json
from meshmax.api.replies import json_reply
from meshmax.api.request_words import request_json
from meshmax.api.stamps import nanoseconds, rfc3339
from meshmax.api.table import route
from meshmax.base.errors import InvalidRequest, NotFound
from meshmax.base.ids import PeerId
from meshmax.base.names import parse_name
from meshmax.base.status import PeerView
from meshmax.services.early_records import EARLY_KEPT
from meshmax.services.route_records import ROUTES_KEPT
from meshmax.telemetry.metrics import REGISTRY

PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PROGRESS_INTERVAL_S: Final = 0.06  # as Ollama paces its progress lines
MAX_PATH: Final = 4096  # bytes; Linux's PATH_MAX


class AddBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/models/add. ``path``: a GGUF file on this machine, absolute. ``link``: hard link it."""

    name: Name
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PATH)]
    link: bool = False


class MeshFace:
    """The routes of the mesh's interface for one node."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._node = prompts.node

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered; the longer path first where a name may hold a slash."""
        get = ("GET", "HEAD")
        return [
            route("/health", self.health, get),
            route("/ready", self.ready, get),
            route("/metrics", self.metrics, get),
            route("/status", self.status, get),
            route("/api/v1/version", self.version, get),
            route("/api/v1/status", self.status, get),
            route("/api/v1/nodes", self.nodes, get),
            route("/api/v1/nodes/{id}", self.node, get),
            route("/api/v1/requests", self.requests, get),
            route("/api/v1/requests/{id:path}", self.request, get),
            route("/api/v1/models", self.models, get),
            route("/api/v1/models/add", self.add, ("POST",)),
        ]

    def name_routes(self) -> list[HttpRoute]:
        """The routes whose path ends in a model's name, to stand after all longer ones."""
        return [
            route("/api/v1/models/{name:path}", self.model, ("GET", "HEAD")),
            route("/api/v1/models/{name:path}", self.delete, ("DELETE",)),
        ]

    async def health(self, _request: Request) -> Response:
        """GET /health: open to everybody, tells nothing but that and how the node lives."""
        node = self._node
        reachable = bool(node.swarm.addresses)
        services = {
            "api": "healthy" if node.state == "running" else "degraded",
            "p2p": "healthy" if reachable else "degraded",
            "store": "healthy",
            "engine": "healthy" if node.config.engine.kind != "none" else "degraded",
        }
        status = "unhealthy" if node.draining.ending else "healthy"
        if status == "healthy" and (node.state != "running" or not reachable):
            status = "degraded"
        body = {
            "status": status,
            "timestamp": rfc3339(node.now()),
            "version": __version__,
            "node_id": node.signer.peer_id,
            "services": services,
        }
        return json_reply(body, 503 if status == "unhealthy" else 200)

    async def ready(self, _request: Request) -> Response:
        """GET /ready: whether a prompt would be answered now."""
        if reason := self._not_ready():
            return json_reply({"status": "not ready", "reason": reason}, 503)
        return json_reply({"status": "ready"})

    def _not_ready(self) -> str:
        node = self._node
        if node.state != "running":
            return f"the node is {node.state}"
        entries = node.catalog.entries()
        if not entries:
            return "no model is here or in the mesh yet: meshmax add NAME FILE.gguf brings one in"
        own = node.signer.peer_id
        if node.config.engine.kind == "none" and not any(
            entry.served or set(entry.anywhere) - {own} for entry in entries
        ):
            return "this node has no engine, and no other peer holds a model"
        return ""

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(generate_latest(REGISTRY), 200, {"content-type": PROMETHEUS_TYPE})

    async def version(self, _request: Request) -> Response:
        """GET /api/v1/version: meshmax's own."""
        return json_reply({"version": __version__})

    async def status(self, _request: Request) -> Response:
        """GET /api/v1/status."""
        node = self._node
        mesh = node.membership.view()
        partials = [msgspec.to_builtins(leftover) for leftover in await node.leftovers.list()]
        return json_reply(
            {
                "node_id": node.signer.peer_id,
                "name": node.name,
                "version": __version__,
                "state": node.state,
                "mesh": mesh.name if mesh.mesh else "open LAN mesh",
                "mesh_id": mesh.mesh,
                "joining": mesh.joining,
                "addresses": list(node.swarm.addresses),
                "connections": len(node.swarm.connections()),
                "uptime": nanoseconds(node.now() - node.started_at_s),
                "partials": partials,
                "bootstrap": [msgspec.to_builtins(each) for each in mesh.bootstrap],
                "discovery": [msgspec.to_builtins(report) for report in node.ladder.reports()],
                "resources": node.resources(),
                "backends": mesh_words.backends_json(node.backends.reports()),
                "problems": [problem for problem in (mesh.problem, node.presence.problem) if problem],
                "reachability": {
                    "addresses": len(node.swarm.addresses),
                    "lan": node.config.lan,
                    **reachability_json(
                        node.reachability.view, udp_blocked=node.reachability.udp_blocked, now_s=trio.current_time()
                    ),
                },
            }
        )

    async def nodes(self, _request: Request) -> Response:
        """GET /api/v1/nodes: ourselves first."""
        views = self._node.presence.peers()
        return json_reply({"nodes": {view.peer_id: self._node_json(view) for view in views}})

    async def node(self, request: Request) -> Response:
        """GET /api/v1/nodes/{id}: by PeerId or by a name that only one has."""
        return json_reply(self._node_json(self._find_node(request.path_params["id"])))

    def _node_json(self, view: PeerView) -> dict[str, Any]:
        return mesh_words.node_json(view, self._node.path_of(view.peer_id))

    def find_id(self, wanted: str) -> PeerId:
        """The PeerId of a node, by it or by a name that only one has. Raises NotFound."""
        return self._find_node(wanted).peer_id

    def _find_node(self, wanted: str) -> PeerView:
        views = self._node.presence.peers()
        found = [view for view in views if view.peer_id == wanted]
        found = found or [view for view in views if view.status and view.status.name == wanted]
        if len(found) > 1:
            raise NotFound(f"{len(found)} nodes are named '{wanted[:100]}': use the PeerId of one of them")
        if not found:
            raise NotFound(f"no peer '{wanted[:100]}' is known here: `meshmax peers` lists those that are")
        return found[0]

    async def models(self, _request: Request) -> Response:
        """GET /api/v1/models."""
        return json_reply(mesh_words.models_json(self._node.catalog.entries()))

    async def model(self, request: Request) -> Response:
        """GET /api/v1/models/{name}: with its blobs where the model is here."""
        name = request.path_params["name"]
        resolved = await self._prompts.find(name, request)
        blobs: list[dict[str, Any]] = []
        for layer in resolved.stored.manifest.blobs if resolved.stored else ():
            blob: dict[str, Any] = {"digest": layer.digest, "size": layer.size, "media_type": layer.media_type}
            if known := await self._node.store.blobs.haves(layer.digest):
                chunk_map, haves = known
                blob |= {
                    "chunks": haves.count,
                    "chunks_here": haves.total,
                    "chunk_bytes": chunk_map.chunk_bytes,
                    "blake3": chunk_map.blake3.hex(),
                }
            blobs.append(blob)
        return json_reply(mesh_words.model_json(resolved.name, resolved.entry) | {"blobs": blobs})

    async def delete(self, request: Request) -> Response:
        """DELETE /api/v1/models/{name}: this node's copy."""
        name = request.path_params["name"]
        parse_name(name)
        await delete_model(self._prompts, name)
        return json_reply({"name": name})

    async def requests(self, _request: Request) -> Response:
        """GET /api/v1/requests: where prompts went and why, never their text."""
        names = self._peer_names()
        return json_reply({"requests": [request_json(taken, names) for taken in self._prompts.routes()]})

    async def request(self, request: Request) -> Response:
        """GET /api/v1/requests/{id}."""
        wanted = request.path_params["id"]
        if (taken := self._prompts.route(wanted)) is not None:
            return json_reply(request_json(taken, self._peer_names()))
        raise NotFound(
            f"no request '{wanted[:100]}' is remembered here: the last {ROUTES_KEPT} that came to this peer are, and of those"
            f" that were refused the last {EARLY_KEPT}, but for bodies that could not be read, whose reply said all. Only the"
            " peer that a prompt came to knows what became of it: `meshmax why ID` on its machine, or with --api HOST:PORT"
        )

    def _peer_names(self) -> dict[PeerId, str]:
        views = self._node.presence.peers()
        return {view.peer_id: view.status.name for view in views if view.status and view.status.name}

    async def add(self, request: Request) -> WorkReply:
        """POST /api/v1/models/add: take a file of this machine in, with progress lines as a pull has them."""
        body = await read_words(request, AddBody)
        parse_name(body.name)
        path = Path(body.path)
        if not path.is_absolute() or "\0" in body.path:
            raise InvalidRequest("path must be absolute, on the machine that this node runs on")
        return WorkReply(lambda emit: self._add(body, path, emit), self._prompts.open_answers, "mesh")

    async def _add(self, body: AddBody, path: Path, emit: Emit) -> None:
        seen = (0, 0)

        def progress(done: int, total: int) -> None:  # called from any thread: an assignment is all it may do
            nonlocal seen
            seen = (done, total)

        async def report() -> None:
            shown = (0, 0)
            while True:
                await trio.sleep(PROGRESS_INTERVAL_S)
                if seen != shown:
                    shown = seen
                    await emit({"status": "adding model", "total": shown[1], "completed": shown[0]})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            stored = await self._node.catalog.add(body.name, path, body.link, progress)
            nursery.cancel_scope.cancel()
        await emit({"status": "adding model", "total": stored.manifest.size, "completed": stored.manifest.size})
        if stored.kept:
            await emit({"status": f"'{stored.name}' meant another model, which is kept as '{stored.kept}'"})
        await emit({"status": "success", "name": stored.name, "digest": stored.manifest.digest})
