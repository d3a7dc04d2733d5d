"""POST /api/v1/models/export and /import, GET /api/v1/have: models in files, between sites that no network joins.

Paths are on the machine that the node runs on, absolute. Export and import answer with lines of progress; the last one is
``success`` or an error. Not here: what a bundle is (wire.bundle), how it is written and read (services).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_words
from meshmax.api.exchange import OpenAnswers, WorkReply
from meshmax.api.table import route
from meshmax.base.errors import InvalidRequest
from meshmax.base.names import MAX_NAME
from meshmax.base.units import MIB, parse_bytes
from meshmax.services.bundles import Bundles
from meshmax.services.export import ExportOrder, part_bytes_of
from meshmax.wire.bundle import FAT32_BYTES, MAX_MODELS
from meshmax.wire.have import MAX_LIST_BYTES, HaveList, encode_have

FAT32: Final = "fat32"  # a part size, in a word
MAX_PATHS: Final = 10_000

Path4K = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class ExportBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an export. ``split``: how long a part may be, as bytes or a text like 4GB or fat32; 0: one file.

    ``lacking``: what the other site has, as GET /api/v1/have tells there.
    """

    models: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=MAX_NAME)], ...], msgspec.Meta(max_length=MAX_MODELS)
    ]
    to: Path4K
    split: int | str = 0
    lacking: HaveList | None = None


class ImportBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an import: folders, or files with the parts beside them. ``alone``: nothing from peers."""

    paths: Annotated[tuple[Path4K, ...], msgspec.Meta(min_length=1, max_length=MAX_PATHS)]
    alone: bool = False


class HasBundles(Protocol):
    """A node that exports and imports."""

    @property
    def bundles(self) -> Bundles:
        """See services.bundles."""
        ...


class BundleFace:
    """The routes of bundles for one node."""

    def __init__(self, node: HasBundles, open_answers: OpenAnswers) -> None:
        self._node, self._open_answers = node, open_answers

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        return [
            route("/api/v1/models/export", self.export, ("POST",)),
            route("/api/v1/models/import", self.import_, ("POST",)),
            route("/api/v1/have", self.have, ("GET",)),
        ]

    async def export(self, request: Request) -> WorkReply:
        """Write a bundle. Going away interrupts it; asking again goes on."""
        body = await read_words(request, ExportBody, MAX_LIST_BYTES + MIB)
        order = ExportOrder(body.models, _path(body.to), _part_bytes(body.split), body.lacking)
        return WorkReply(partial(self._node.bundles.exporter.run, order), self._open_answers, "mesh")

    async def import_(self, request: Request) -> WorkReply:
        """Read bundles. Going away interrupts it; asking again goes on."""
        body = await read_words(request, ImportBody, 4 * MIB)
        paths = [_path(path) for path in body.paths]
        return WorkReply(partial(self._node.bundles.importer.run, paths, alone=body.alone), self._open_answers, "mesh")

    async def have(self, request: Request) -> Response:
        """What this node has; with ``?mesh=true`` what its mesh has."""
        asked = dict(request.query_params)
        if asked.pop("mesh", "false") not in ("true", "false") or asked:
            raise InvalidRequest("the only parameter is mesh, which is true or false")
        found = await self._node.bundles.have.run(request.query_params.get("mesh") == "true")
        return Response(encode_have(found), 200, {"content-type": "application/json"})


def _path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise InvalidRequest("a path must be absolute, on the machine that this node runs on")
    return path


def _part_bytes(split: int | str) -> int:
    if isinstance(split, str):
        split = FAT32_BYTES if split.lower() == FAT32 else parse_bytes(split)
    if not 0 <= split <= 1 << 50:
        raise InvalidRequest("split is how long a part may be, in bytes")
    return part_bytes_of(split)
