"""Transfers over HTTP (mesh-api): which there are, steering them, downloads in the background, asking peers to download.

A download that was accepted (202) is finished even if this node is restarted meanwhile. Not here: pulls that a client
watches (ollama_routes), what a transfer does (services.pull).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api import mesh_words
from meshmax.api.bodies import decode_words, read_body, read_words, require_json
from meshmax.api.node_view import ApiNode
from meshmax.api.replies import error_body, json_reply, model_not_found
from meshmax.api.table import route
from meshmax.base.errors import InvalidRequest, MeshmaxError, ModelNotFound, NotFound
from meshmax.base.ids import PeerId
from meshmax.base.names import parse_name, split_digest

MAX_EMPTY_BYTES: Final = 1024  # of a body that says nothing
MAX_NODES: Final = 256  # named in one request

Action = Literal["cancel", "pause", "resume"]
_ACTIONS: Final[tuple[Action, ...]] = ("cancel", "pause", "resume")


class NoBody(msgspec.Struct, forbid_unknown_fields=True):
    """A body without fields."""


class DistributeBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of distribute: ``nodes`` (PeerIds or unique names) or a number of ``replicas`` in the mesh."""

    nodes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_NODES)] | None = None
    replicas: Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)] | None = None


class TransferFace:
    """The routes about transfers of one node; ``find_node`` gives the PeerId of a node that is named."""

    def __init__(self, node: ApiNode, find_node: Callable[[str], PeerId]) -> None:
        self._node = node
        self._find_node = find_node

    def routes(self) -> list[HttpRoute]:
        """Every route; to stand before those whose path ends in a model's name."""
        get, post = ("GET", "HEAD"), ("POST",)
        return [
            route("/api/v1/transfers", self.transfers, get),
            route("/api/v1/transfers/{id}", self.transfer, get),
            *(route(f"/api/v1/transfers/{{id}}/{action}", self._steering(action), post) for action in _ACTIONS),
            route("/api/v1/models/{name:path}/download", self.download, post),
            route("/api/v1/models/{name:path}/distribute", self.distribute, post),
        ]

    async def transfers(self, _request: Request) -> Response:
        """GET /api/v1/transfers."""
        shown = [mesh_words.transfer_json(transfer) for transfer in self._node.pulls.transfers()]
        return json_reply({"transfers": shown})

    async def transfer(self, request: Request) -> Response:
        """GET /api/v1/transfers/{id}."""
        wanted = request.path_params["id"]
        for transfer in self._node.pulls.transfers():
            if transfer.id == wanted:
                return json_reply(mesh_words.transfer_json(transfer))
        raise NotFound(f"no transfer '{wanted[:100]}' is known here")

    def _steering(self, action: Action) -> Callable[[Request], Awaitable[Response]]:
        return partial(self._steer, action=action)

    async def _steer(self, request: Request, *, action: Action) -> Response:
        """POST /api/v1/transfers/{id}/cancel, /pause, /resume."""
        await _read_nothing(request)
        transfer = await self._node.pulls.steer(request.path_params["id"], action)
        return json_reply({"id": transfer.id, "state": transfer.state})

    async def download(self, request: Request) -> Response:
        """POST /api/v1/models/{name}/download: pull it to here in the background."""
        await _read_nothing(request)
        name = _model(request)
        transfer = await self._node.pulls.start_download(name)
        if transfer.state == "paused":  # who asks for it wants it
            transfer = await self._node.pulls.steer(transfer.id, "resume")
        return json_reply({"transfer_id": transfer.id}, 202)

    async def distribute(self, request: Request) -> Response:
        """POST /api/v1/models/{name}/distribute: ask other nodes to pull it. ``refused`` tells who would not, and why."""
        require_json(request)
        body = await read_words(request, DistributeBody)
        if (body.nodes is None) is (body.replicas is None):
            raise InvalidRequest("say either nodes (a list of ids or names) or replicas (a number)")
        name = _model(request)
        work = self._node.distribution
        try:
            if body.nodes is not None:
                answers = await work.distribute(name, [self._find_node(node) for node in body.nodes])
            else:
                answers = await work.replicate(name, body.replicas or 0)
        except ModelNotFound:
            raise model_not_found(name) from None
        return json_reply(_answers_json(answers), 202)


def _answers_json(answers: Mapping[PeerId, str | MeshmaxError]) -> dict[str, Any]:
    """What the asked nodes said. Raises the first refusal where all refused."""
    refused = {peer: answer for peer, answer in answers.items() if isinstance(answer, MeshmaxError)}
    if refused and len(refused) == len(answers):
        raise next(iter(refused.values()))
    shown: dict[str, Any] = {
        "transfer_ids": {peer: answer for peer, answer in answers.items() if isinstance(answer, str)}
    }
    if refused:
        shown["refused"] = {peer: error_body(error, "mesh") for peer, error in refused.items()}
    return shown


def _model(request: Request) -> str:
    name: str = request.path_params["name"]
    parse_name(split_digest(name)[0])
    return name


async def _read_nothing(request: Request) -> None:
    """Refuse a body that says something."""
    body = await read_body(request, MAX_EMPTY_BYTES)
    if body.strip():
        require_json(request)
        decode_words(body, NoBody)
