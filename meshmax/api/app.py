"""The ASGI application of a node: the tables of routes, those that are closed, and the guard around them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from meshmax.api.access import Policy
from meshmax.api.adopt_routes import AdoptFace
from meshmax.api.bundle_routes import BundleFace
from meshmax.api.doctor_routes import DoctorFace
from meshmax.api.drain_routes import DrainFace
from meshmax.api.fsck_routes import FsckFace
from meshmax.api.guard import Guard
from meshmax.api.limit_routes import LimitFace
from meshmax.api.membership_routes import MembershipFace
from meshmax.api.mesh_routes import MeshFace
from meshmax.api.node_view import ApiNode
from meshmax.api.ollama_routes import OllamaFace
from meshmax.api.openai_routes import OpenAiFace
from meshmax.api.prompts import Prompts
from meshmax.api.registry_routes import RegistryFace
from meshmax.api.registry_uploads import UploadFace
from meshmax.api.sweep_routes import SweepFace
from meshmax.api.table import ANY_VERB, Table, closed_route
from meshmax.api.transfer_routes import TransferFace

REQUEST_ID_BYTES: Final = 16  # random, as many as a UUID has
_POST: Final = ("POST",)
_GET: Final = ("GET",)

# Known to clients, not offered yet: (path, verbs, what it would be).
CLOSED: Final = (
    ("/api/create", _POST, "Making models from other models or files"),
    ("/api/push", _POST, "Pushing to a registry"),
    ("/api/blobs/{digest}", _POST, "Uploading blobs"),
    ("/api/me", _POST, "An account"),
    ("/api/signout", _POST, "An account"),
    ("/api/user/keys/{key}", ("DELETE",), "An account"),
    ("/api/experimental/{rest:path}", ANY_VERB, "Web search and the other experimental interfaces"),
    ("/v1/responses", _POST, "The responses interface"),
    ("/v1/audio/transcriptions", _POST, "Transcribing audio"),
    ("/v1/messages", _POST, "The messages interface"),
    ("/docs", _GET, "The interface's documentation page"),
    ("/api/v1/openapi.json", _GET, "The OpenAPI document"),
    ("/api/v1/ws", _GET, "The stream of events"),
    ("/api/v1/metrics", _GET, "This summary (GET /metrics has the figures)"),
    ("/api/v1/cluster/{rest:path}", ANY_VERB, "Managing the cluster"),
    ("/api/v1/config", ANY_VERB, "Changing the configuration"),
    ("/api/v1/auth/{rest:path}", ANY_VERB, "Managing access"),
    ("/api/v1/plugins", ANY_VERB, "Plugins"),
)


class Application:
    """What `make_app` makes. ``end_answers`` ends what is under way with an error that says so; ``keep_time``, for whoever
    has many streams at once, runs until cancelled.
    """

    def __init__(
        self, guarded: ASGIApp, end_answers: Callable[[], None], keep_time: Callable[[], Awaitable[None]]
    ) -> None:
        self._guarded = guarded
        self.end_answers, self.keep_time = end_answers, keep_time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._guarded(scope, receive, send)


def make_app(node: ApiNode, *, loopback: bool = True, local_addresses: tuple[str, ...] = ()) -> Application:
    """The application. ``loopback``: it is bound there, so Host is checked; else every call needs ``node.token``."""
    prompts = Prompts(node)
    mesh = MeshFace(prompts)
    routes: list[Route] = [
        *OllamaFace(prompts).routes(),
        *OpenAiFace(prompts).routes(),
        *mesh.routes(),
        *MembershipFace(node, mesh.find_id).routes(),
        *DrainFace(node, mesh.find_id).routes(),
        *LimitFace(node).routes(),
        *UploadFace(node).routes(),
        *RegistryFace(node, prompts.open_answers).routes(),
        *FsckFace(node, prompts.open_answers).routes(),
        *DoctorFace(node, prompts.open_answers).routes(),
        *AdoptFace(node, prompts.open_answers).routes(),
        *BundleFace(node, prompts.open_answers).routes(),
        *TransferFace(node, mesh.find_id).routes(),
        *SweepFace(node).routes(),
        *(closed_route(path, verbs, what) for path, verbs, what in CLOSED),
        *mesh.name_routes(),
    ]
    policy = Policy(
        loopback=loopback,
        hostname=socket.gethostname(),
        local_addresses=local_addresses,
        token=node.config.token or node.token,
        origins=node.config.origins,
    )
    guard = Guard(Table(routes), policy, partial(secrets.token_hex, REQUEST_ID_BYTES))
    return Application(guard, prompts.open_answers.end_all, prompts.open_answers.pauses.run)
